"""The sparse mixture again, in plain NumPy float64: one token and one expert at a time.

Nothing here is shared with keras_moe. Axis letters: n tokens, d input features,
e experts, h hidden units, u output units, k choices a token, c capacity (slots an
expert). Experts are a list of functions of one row, (d,) -> (u,); what a router said is
a dict of arrays, as in `tests/support/routing_oracles.py`.
"""

import math

import numpy as np

from tests.support import oracles


def silu(x):
    return x / (1.0 + np.exp(-x))


def mlp_experts(kernels, biases=(), activation=oracles.relu):
    """The e experts of the stacked kernels [(e, in, out), ...], biases [(e, out)]."""

    def expert(number):
        return lambda row: oracles.mlp(
            row,
            [kernel[number] for kernel in kernels],
            [bias[number] for bias in biases],
            activation,
            oracles.linear,
        )

    return [expert(number) for number in range(len(kernels[0]))]


def glu_experts(kernels, biases=None, activation=silu):
    """Shazeer 2020, equation 6. kernels: G, U (e, d, h) and D (e, h, u)."""

    def expert(number):
        gate, up, down = [kernel[number] for kernel in kernels]
        to_gate, to_up, to_down = [b[number] for b in biases] if biases else [0.0] * 3

        def of_row(row):
            hidden = activation(row @ gate + to_gate) * (row @ up + to_up)
            return hidden @ down + to_down

        return of_row

    return [expert(number) for number in range(len(kernels[0]))]


def moe(x, record, experts, mask=None, kept=None, shared=()):
    """y_i = sum over the choices of token i of w f(x_i), plus all shared experts.

    `record` holds the choices of tokens (n, k), those of experts (e, c), or the weights
    (n, e) of a dense gate. `kept` (n, k) says which choices are not dropped.
    """
    n, weights = len(x), record["combine_weights"]
    units = len(experts[0](np.zeros(x.shape[1])))
    outputs = np.zeros((n, units))
    for i in range(n):
        if mask is not None and not mask[i]:
            continue
        for expert in shared:
            outputs[i] += expert(x[i])
        if "expert_indices" in record:
            for j, number in enumerate(record["expert_indices"][i]):
                if kept is None or kept[i][j]:
                    outputs[i] += weights[i, j] * experts[number](x[i])
        elif "token_indices" in record:
            for number, slots in enumerate(record["token_indices"]):
                for slot, token in enumerate(slots):
                    if token == i:
                        outputs[i] += weights[number, slot] * experts[number](x[i])
        else:
            for number, expert in enumerate(experts):
                outputs[i] += weights[i, number] * expert(x[i])
    return outputs


def capacity(n, e, k, factor):
    """ceil(factor * k * n / e), at least 1 and at most n. `factor` is a fraction."""
    return max(1, min(n, math.ceil(factor * k * n / e)))


def queue(indices, weights, e, c, priority, mask=None):
    """Serve the choices one after the other. Returns kept (n, k) and slots, e lists.

    By "position" all first choices come before all second ones, by "probability" the
    highest weight; among equals, the order of the tokens, then that of the choices.
    """
    n, k = np.shape(indices)
    waiting = [(i, j) for i in range(n) for j in range(k) if mask is None or mask[i]]
    if priority == "position":
        waiting.sort(key=lambda choice: (choice[1], choice[0]))
    else:
        waiting.sort(key=lambda choice: -weights[choice])
    kept = np.zeros((n, k), bool)
    slots = [[] for _ in range(e)]
    for i, j in waiting:
        expert = slots[indices[i, j]]
        if len(expert) < c:
            expert.append(i)
            kept[i, j] = True
    return kept, slots
