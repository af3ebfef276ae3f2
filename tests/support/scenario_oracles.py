"""Layers for several scenarios again, in plain NumPy float64, as literal as can be.

Nothing here is shared with keras_moe: one row, one scenario, one expert at a time. Axis
letters: n rows, d features, p scenarios, t tasks, u output units.

An id outside [0, p) is unknown.
"""

import numpy as np

from tests.support.oracles import mlp, relu, softmax_row


def partitioned_normalization(x, ids, weights, statistics=None, epsilon=1e-3):
    """Sheng et al. 2021, section 4.2, for rows of several scenarios.

    weights: gamma (d,), beta (d,), gamma_p (p, d), beta_p (p, d). statistics: mean and
    variance (p + 1, d), the last row for unknown ids; None computes those of `x`.
    """
    gamma, beta, own_gamma, own_beta = weights
    p = len(own_gamma)
    outputs = np.zeros_like(x)
    for row, scenario in enumerate(ids):
        known = 0 <= scenario < p
        if statistics is None:
            members = [i for i in range(len(x)) if not known or ids[i] == scenario]
            mean = sum(x[i] for i in members) / len(members)
            variance = sum((x[i] - mean) ** 2 for i in members) / len(members)
        else:
            place = scenario if known else p
            mean, variance = statistics[0][place], statistics[1][place]
        scale, offset = gamma, beta
        if known:
            scale, offset = gamma * own_gamma[scenario], beta + own_beta[scenario]
        outputs[row] = scale * (x[row] - mean) / np.sqrt(variance + epsilon) + offset
    return outputs


def star(x, seen, ids, layers, auxiliary=None, activation=relu, final=None):
    """Sheng et al. 2021, section 4.3 and 4.4, row by row: (n, u).

    x: the inputs of the MLP, normalized or not. layers: (W, W_p, b, b_p) of each, with
    W_p (p, in, out). auxiliary: kernels, biases and embedding (p, m); it reads `seen`.
    """
    rows = []
    for row, scenario in enumerate(ids):
        hidden = x[row]
        known = 0 <= scenario < len(layers[0][1])
        for i, (kernel, own_kernel, bias, own_bias) in enumerate(layers):
            if known:
                kernel = kernel * own_kernel[scenario]
                bias = bias + own_bias[scenario]
            hidden = hidden @ kernel + bias
            if i < len(layers) - 1:
                hidden = activation(hidden)
        if auxiliary is not None:
            kernels, biases, embedding = auxiliary
            own = embedding[scenario] if known else np.zeros_like(embedding[0])
            read = np.concatenate([own, seen[row]])[None]
            hidden = hidden + mlp(read, kernels, biases, activation, lambda z: z)[0]
        rows.append(hidden if final is None else final(hidden))
    return np.stack(rows)


def fused(outputs, own, alpha):
    """The own output with weight alpha, the mean of the others with the rest."""
    others = [output for i, output in enumerate(outputs) if i != own]
    if not others:
        return outputs[own]
    return alpha * outputs[own] + (1 - alpha) * sum(others) / len(others)


def m3oe(x, ids, experts, gates, sizes, balance, temperature=1.0):
    """Zhang et al. 2024, row by row. Returns one (n, u) a task.

    experts: functions (n, d) -> (n, u), the shared ones, then one of each scenario,
    then one of each task. gates: functions (n, d) -> (n, s), those of the tasks in the
    first scenario first. sizes: s, p, t. balance: the logits of both alpha and of both
    beta.
    """
    s, p, t = sizes
    alpha_s, alpha_t, beta_s, beta_t = (1 / (1 + np.exp(-z)) for z in balance)
    results = [[] for _ in range(t)]
    for row, scenario in enumerate(ids):
        one = x[row : row + 1]
        outputs = [expert(one)[0] for expert in experts]
        shared, domains, tasks = outputs[:s], outputs[s : s + p], outputs[s + p :]
        scenarios = [scenario] if 0 <= scenario < p else list(range(p))
        for task in range(t):
            mixture = 0.0
            for q in scenarios:
                logits = gates[q * t + task](one)[0] / temperature
                for weight, output in zip(softmax_row(logits), shared, strict=True):
                    mixture = mixture + weight * output / len(scenarios)
                domain = fused(domains, q, alpha_s)
                mixture = mixture + beta_s * domain / len(scenarios)
            mixture = mixture + beta_t * fused(tasks, task, alpha_t)
            results[task].append(mixture)
    return [np.stack(of_task) for of_task in results]
