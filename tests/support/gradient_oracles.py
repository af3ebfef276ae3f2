"""Per-task gradients of a small network and how they are combined, in NumPy float64.

Nothing here is shared with keras_moe: gradients are vectors, not Gramians.
"""

import numpy as np


def network(x, kernel, bias, towers):
    """tanh(x W + b), and a linear tower per task: outputs (n,) by task."""
    hidden = np.tanh(x @ kernel + bias)
    return hidden, [(hidden @ w + b)[:, 0] for w, b in towers]


def gradients(x, kernel, bias, towers, labels, used):
    """The gradients of each task's mean squared error over the rows that it uses.

    Returns by task (by kernel, by bias, by own tower kernel, by own tower bias).
    """
    hidden, outputs = network(x, kernel, bias, towers)
    found = []
    for (w, _), output, label, use in zip(towers, outputs, labels, used, strict=True):
        by_kernel, by_bias = np.zeros_like(kernel), np.zeros_like(bias)
        by_w, by_b = np.zeros_like(w), np.zeros(1)
        for row in range(len(x)):
            if not use[row]:
                continue
            error = 2 * (output[row] - label[row]) / sum(use)
            by_w[:, 0] += error * hidden[row]
            by_b += error
            inner = error * w[:, 0] * (1 - hidden[row] ** 2)
            by_kernel += np.outer(x[row], inner)
            by_bias += inner
        found.append((by_kernel, by_bias, by_w, by_b))
    return found


def pcgrad(vectors):
    """Yu et al. 2020, algorithm 1, for two tasks, where no order is drawn."""
    first, second = vectors
    projected = []
    for g, other in ((first, second), (second, first)):
        product = float(g @ other)
        projected.append(
            g - product / float(other @ other) * other if product < 0 else g
        )
    return projected[0] + projected[1]


def mgda(vectors):
    """The shortest vector between two (Sener & Koltun 2018, equation 4)."""
    first, second = vectors
    difference = second - first
    share = float(difference @ second) / float(difference @ difference)
    share = min(max(share, 0.0), 1.0)
    return share * first + (1 - share) * second


def total(vectors):
    return sum(vectors)
