"""The multi-task family again, in plain NumPy float64, as literal as can be.

Nothing here is shared with keras_moe: no stacking, one expert and one task at a time.
Axis letters: n rows, d input features, e experts, m experts of one task, s shared
experts, t tasks, u output units.

Experts and gates are lists of functions of a stream (n, d): an expert gives (n, u), a
gate the logits (n, e). Experts of the first task come first, shared ones last.
"""

import numpy as np

from tests.support import oracles


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def mlps(kernels, biases=(), activation=oracles.relu, final_activation=oracles.linear):
    """The e MLPs in kernels [(e, in, out), ...] and biases [(e, out), ...]."""

    def mlp(k):
        return lambda x: oracles.mlp(
            x,
            [kernel[k] for kernel in kernels],
            [bias[k] for bias in biases],
            activation,
            final_activation,
        )

    return [mlp(k) for k in range(len(kernels[0]))]


def softmax(logits, temperature=1.0, top_k=None):
    """Row by row over the `top_k` largest logits, or all: (n, e) -> (n, e).

    A single weight is that among all logits, as it would be 1 among itself.
    """
    logits = logits / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = weights.sum(axis=1, keepdims=True)
    if top_k is not None:
        for row, z in enumerate(logits):
            weights[row, np.argsort(-z, kind="stable")[top_k:]] = 0.0
    return weights / (total if top_k == 1 else weights.sum(axis=1, keepdims=True))


def mixture(weights, outputs):
    """sum_i w_i f_i of weights (n, e), or (e,) for all rows, and e outputs (n, u)."""
    total = np.zeros_like(outputs[0])
    for i, output in enumerate(outputs):
        total = total + weights[..., i, None] * output
    return total


def joint_weights(logits, temperature, top_k, shared_top_k):
    """Weights [(n, e), ...] of t gates with a joint budget of experts (SMES).

    Row by row: the experts with the largest sum of probabilities, then each task's
    best others. A task's single expert keeps its probability.
    """
    probs = [softmax(z, temperature) for z in logits]
    weights = [np.zeros_like(p) for p in probs]
    for row in range(len(probs[0])):
        scores = sum(p[row] for p in probs)
        shared = list(np.argsort(-scores, kind="stable")[:shared_top_k])
        for task, p in enumerate(probs):
            order = np.argsort(-p[row], kind="stable")
            private = [k for k in order if k not in shared][:top_k]
            total = sum(p[row, k] for k in shared + private)
            if shared_top_k + top_k == 1:
                total = 1.0
            for k in shared + private:
                weights[task][row, k] = p[row, k] / total
    return weights


def gate_weights(logits, temperature=1.0, top_k=None, shared_top_k=None):
    """Weights (n, e) of each gate, for the logits (n, e) of each."""
    if shared_top_k is not None:
        return joint_weights(logits, temperature, top_k, shared_top_k)
    return [softmax(z, temperature, top_k) for z in logits]


def mmoe(x, experts, gates, gate_x=None, **options):
    """Ma et al. 2018, equations 6 and 7."""
    outputs = [expert(x) for expert in experts]
    gate_x = x if gate_x is None else gate_x
    weights = gate_weights([gate(gate_x) for gate in gates], **options)
    return [mixture(of_task, outputs) for of_task in weights]


def omoe(x, experts, gate, num_tasks, **options):
    """Ma et al. 2018, section 4.1: one gate, so one mixture for all tasks."""
    (weights,) = gate_weights([gate(x)], **options)
    output = mixture(weights, [expert(x) for expert in experts])
    return [output] * num_tasks


def ple(x, levels, t, m, temperature=1.0):
    """Tang et al. 2020, equations 1 to 7. CGC is its first level alone.

    levels: (experts, gates of the tasks, gate of the shared stream or None).
    """
    streams, shared = [x] * t, x
    for experts, gates, shared_gate in levels:
        own = [[f(streams[k]) for f in experts[k * m : (k + 1) * m]] for k in range(t)]
        common = [f(shared) for f in experts[t * m :]]
        streams = [
            mixture(softmax(gates[k](streams[k]), temperature), own[k] + common)
            for k in range(t)
        ]
        if shared_gate is not None:
            everything = [output for outputs in own for output in outputs] + common
            shared = mixture(softmax(shared_gate(shared), temperature), everything)
    return streams


def adatt(x, levels, t, m, residual=True, temperature=1.0):
    """Li et al. 2023, section 3.2: y_k = G_k(x_k) [all experts] + v_k [own experts].

    levels: (experts, gates, v of the tasks or None, v of the shared experts or None).
    A gate more than tasks is that of the shared experts; v is 1 where it is None.
    """
    streams = [x] * (t + 1)
    for experts, gates, own_weights, shared_own_weights in levels:
        owners = [min(i // m, t) for i in range(len(experts))]
        outputs = [f(streams[owner]) for f, owner in zip(experts, owners, strict=True)]
        above = []
        for k, gate in enumerate(gates):
            fused = mixture(softmax(gate(streams[k]), temperature), outputs)
            if residual:
                own = [
                    f for f, owner in zip(outputs, owners, strict=True) if owner == k
                ]
                weights = own_weights[k] if k < t and own_weights is not None else None
                if k == t and shared_own_weights is not None:
                    weights = shared_own_weights[0]
                weights = np.ones(len(own)) if weights is None else weights
                fused = fused + mixture(weights, own)
            above.append(fused)
        streams = above
    return streams[:t]


def stem(x, task_x, levels, t, m, temperature=1.0, held=None):
    """Su et al. 2024: what a task reads of another one's experts has no gradient.

    levels: (experts, gates of the tasks, gate of the shared stream or None). `held` is
    what the experts of each level gave before a weight or an input was moved; without
    a gradient they stay as they were. Returns the outputs, and what to hold.
    """
    streams, shared = [task_x[:, k] for k in range(t)], x
    to_hold = []
    for level, (experts, gates, shared_gate) in enumerate(levels):
        owners = [min(i // m, t) for i in range(len(experts))]
        outputs = [
            f(shared if owner == t else streams[owner])
            for f, owner in zip(experts, owners, strict=True)
        ]
        to_hold.append(outputs)
        stopped = outputs if held is None else held[level]

        def seen_by(reader, outputs=outputs, stopped=stopped, owners=owners):
            """Own and shared experts as they are, the others stopped."""
            return [
                outputs[i] if owner in (reader, t) else stopped[i]
                for i, owner in enumerate(owners)
            ]

        above = [
            mixture(softmax(gates[k](streams[k] + shared), temperature), seen_by(k))
            for k in range(t)
        ]
        if shared_gate is not None:
            weights = softmax(shared_gate(shared), temperature)
            shared = mixture(weights, seen_by(t))
        streams = above
    return streams, to_hold


def batch_normalization(x, gamma, beta, statistics=None, epsilon=1e-3):
    """By the mean and the variance (u,) of the rows (n, u), or by those given."""
    mean, variance = statistics or (x.mean(axis=0), x.var(axis=0))
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def feature_gate(v, b, a):
    """Wang et al. 2024, section 3.3: v * 2 sigmoid(v B A)."""
    return v * 2.0 * sigmoid(v @ b @ a)


def self_weights(logits):
    """A sigmoid for one expert, else a softmax: (n, m) -> (n, m)."""
    return sigmoid(logits) if logits.shape[1] == 1 else softmax(logits)


def home(x, meta, task, group_of_task, m, temperature=1.0):
    """Wang et al. 2024, section 3: a level of groups, then one of tasks.

    meta: a dict of `experts` (those of the first group first, shared ones last),
    `gates` and `self_gates` of the groups, `shared_gate` and `shared_self_gate`.
    task: a dict of `experts` (of the tasks, of the groups, shared), `gates` and
    `self_gates`. Self gates are None where there are none.
    """
    c, t = max(group_of_task) + 1, len(group_of_task)
    outputs = [f(x) for f in meta["experts"]]
    common = outputs[c * m :]
    streams = []
    for group in range(c):
        own = outputs[group * m : (group + 1) * m]
        stream = mixture(softmax(meta["gates"][group](x), temperature), own + common)
        if meta["self_gates"] is not None:
            stream = stream + mixture(self_weights(meta["self_gates"][group](x)), own)
        streams.append(stream)
    shared = mixture(softmax(meta["shared_gate"](x), temperature), outputs)
    if meta["shared_self_gate"] is not None:
        shared = shared + mixture(self_weights(meta["shared_self_gate"](x)), common)

    experts = task["experts"]
    common = [f(shared) for f in experts[(t + c) * m :]]
    results = []
    for k, group in enumerate(group_of_task):
        stream = streams[group]
        own = [f(stream) for f in experts[k * m : (k + 1) * m]]
        first = (t + group) * m
        grouped = [f(stream) for f in experts[first : first + m]]
        read = np.concatenate([stream, shared], axis=1)
        weights = softmax(task["gates"][k](read), temperature)
        result = mixture(weights, own + grouped + common)
        if task["self_gates"] is not None:
            result = result + mixture(self_weights(task["self_gates"][k](read)), own)
        results.append(result)
    return results
