"""The layers again, in plain NumPy float64, as slow and as literal as can be.

Nothing here is shared with keras_moe: no einsum, no stacking, one expert and one task
at a time. Axis letters: n rows, d input features, e experts, t tasks, u output units.
"""

import numpy as np


def relu(x):
    return np.maximum(x, 0.0)


def linear(x):
    return x


def softmax_row(z):
    z = np.exp(z - max(z))
    return z / sum(z)


def mlp(x, kernels, biases, activation, final_activation):
    """One MLP. kernels: [(in, out), ...]; biases: [(out,), ...] or []."""
    for i, kernel in enumerate(kernels):
        x = x @ kernel
        if biases:
            x = x + biases[i]
        x = (final_activation if i == len(kernels) - 1 else activation)(x)
    return x


def mlp_experts(x, kernels, biases, activation=relu, final_activation=linear):
    """Each expert on its own. kernels: [(e, in, out), ...]. Returns (n, e, u)."""
    num_experts = len(kernels[0])
    outputs = [
        mlp(
            x,
            [kernel[k] for kernel in kernels],
            [bias[k] for bias in biases],
            activation,
            final_activation,
        )
        for k in range(num_experts)
    ]
    return np.stack(outputs, axis=1)


def gates(x, kernels, biases=(), temperature=1.0, top_k=None):
    """Ma et al. 2018, equation 7, row by row and task by task. Returns (n, t, e)."""
    logits = mlp_experts(x, kernels, list(biases)) / temperature
    weights = np.zeros_like(logits)
    for n, row in enumerate(logits):
        for t, z in enumerate(row):
            chosen = np.argsort(-z, kind="stable")[: top_k or len(z)]
            # A single weight is that among all logits: among itself it would be 1.
            kept = softmax_row(z)[chosen] if top_k == 1 else softmax_row(z[chosen])
            weights[n, t, chosen] = kept
    return weights


def mmoe(x, kernels, biases, gate_kernels, gate_x=None, temperature=1.0, top_k=None):
    """Ma et al. 2018, equation 6. Returns one (n, u) for each task."""
    experts = mlp_experts(x, kernels, biases, relu, relu)
    weights = gates(
        x if gate_x is None else gate_x,
        gate_kernels,
        temperature=temperature,
        top_k=top_k,
    )
    n, t, e = weights.shape
    outputs = []
    for task in range(t):
        mixture = np.zeros((n, experts.shape[-1]))
        for row in range(n):
            for k in range(e):
                mixture[row] += weights[row, task, k] * experts[row, k]
        outputs.append(mixture)
    return outputs


def numeric_gradients(function, arrays, step=1e-6):
    """The gradient of a scalar function of float64 arrays by central differences."""
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + step
            above = function()
            array[index] = value - step
            below = function()
            array[index] = value
            gradient[index] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients
