"""CrossStitch, DSelectK and PEPNet again, in plain NumPy float64, as literal as can be.

Nothing here is shared with keras_moe: one row, one task, one expert at a time. Axis
letters: n rows, d input features, e experts, t tasks, k selectors, m bits, u units.

Where a layer stops gradients, the oracle takes what is stopped as an array of its own,
which the caller holds still while central differences move the rest.
"""

import math

import numpy as np

from tests.support.oracles import mlp, mlp_experts, relu, softmax_row


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def cross_stitch(x, kernels, biases, stitches, activation=relu):
    """Misra et al. 2016, equation 1, after every layer. Returns one (n, u) a task.

    kernels: [(t, in, out), ...]; stitches: [(t, t) or (t, t, out), ...].
    """
    t = len(kernels[0])
    tasks = [x] * t
    for layer, kernel in enumerate(kernels):
        active = [activation(tasks[j] @ kernel[j] + biases[layer][j]) for j in range(t)]
        tasks = []
        for i in range(t):
            mixed = np.zeros_like(active[0])
            for j in range(t):
                # One number, or one for each unit.
                mixed = mixed + stitches[layer][i, j] * active[j]
            tasks.append(mixed)
    return tasks


def smooth_step(z, gamma):
    """Hazimeh et al. 2020, for one number."""
    if z <= -gamma / 2:
        return 0.0
    if z >= gamma / 2:
        return 1.0
    return -2 / gamma**3 * z**3 + 3 / (2 * gamma) * z + 1 / 2


def selector(z, num_experts, gamma):
    """The weights (e,) that one selector with logits (m,) gives to the experts."""
    weights = []
    for expert in range(num_experts):
        weight = 1.0
        for j, digit in enumerate(format(expert, f"0{len(z)}b")):
            bit = smooth_step(z[j], gamma)
            weight *= bit if digit == "1" else 1.0 - bit
        weights.append(weight)
    return np.array(weights)


def selectors(selector_logits, num_experts, gamma):
    """(n, t, k, m) -> (n, t, k, e)."""
    n, t, k, _ = selector_logits.shape
    selected = np.zeros((n, t, k, num_experts))
    for index in np.ndindex(n, t, k):
        selected[index] = selector(selector_logits[index], num_experts, gamma)
    return selected


def dselect_k_gates(selected, mixing_logits=None):
    """(n, t, k, e), (n, t, k) -> the gates (n, t, e)."""
    n, t, k, e = selected.shape
    gates = np.zeros((n, t, e))
    for row, task in np.ndindex(n, t):
        shares = [1.0] if k == 1 else softmax_row(mixing_logits[row, task])
        for share, weights in zip(shares, selected[row, task], strict=True):
            gates[row, task] += share * weights
    return gates


def mixtures(gates, experts):
    """(n, t, e), (n, e, u) -> one (n, u) a task."""
    n, t, e = gates.shape
    outputs = [np.zeros((n, experts.shape[-1])) for _ in range(t)]
    for row, task, expert in np.ndindex(n, t, e):
        outputs[task][row] += gates[row, task, expert] * experts[row, expert]
    return outputs


def linear_gates(x, kernel, bias):
    """(n, d), (t, d, u), (t, u) -> (n, t, u)."""
    return mlp_experts(x, [kernel], [bias])


def selection_loss(selected, entropy_weight, counted=None):
    """The losses of a DSelectK, added: a sum over selectors, a mean over rows."""
    n, t, k, e = selected.shape
    counted = [True] * n if counted is None else counted
    total = 0.0
    for row, task, j in np.ndindex(n, t, k):
        if not counted[row]:
            continue
        for weight in selected[row, task, j]:
            if weight > 0:
                total -= entropy_weight * weight * math.log(weight)
        if math.log2(e) % 1:
            total += 1 / sum(selected[row, task, j]) - 1
    return total / max(sum(counted), 1)


def gate_nu(x, weights, scale):
    """PEPNet's gate unit; weights: kernel, bias, kernel, bias."""
    first, first_bias, second, second_bias = weights
    return scale * mlp(x, [first, second], [first_bias, second_bias], relu, sigmoid)


def epnet(x, domain, weights, scale, stopped):
    """`stopped` is the x that the gate sees."""
    return gate_nu(np.concatenate([domain, stopped], axis=1), weights, scale) * x


def ppnet(x, prior, kernels, biases, gates, scale, stopped, activation=relu):
    """Returns one (n, u) a task. `stopped` is the x that the gates see."""
    seen = stopped if prior is None else np.concatenate([prior, stopped], axis=1)
    t = len(kernels[0])
    outputs = []
    for task in range(t):
        hidden = x
        for layer, kernel in enumerate(kernels):
            hidden = activation(hidden @ kernel[task] + biases[layer][task])
            h = hidden.shape[1]
            scores = gate_nu(seen, gates[layer], scale)
            hidden = scores[:, task * h : (task + 1) * h] * hidden
        outputs.append(hidden)
    return outputs


def separate_mlps(x, kernels, biases, activation=relu):
    """One MLP a task, which share nothing. Returns one (n, u) a task."""
    return [
        mlp(x, [k[i] for k in kernels], [b[i] for b in biases], activation, activation)
        for i in range(len(kernels[0]))
    ]
