"""The losses of heads again, row by row, in plain Python floats.

Nothing here is shared with keras_moe. Every function takes one row, and returns the
loss of the row; `mean` is the mean over the rows with a weight.
"""

import math

import numpy as np


def binary(y, outputs):
    return sum(log_loss(y, p) for p in outputs) / len(outputs)


def log_loss(y, p):
    """-y log p - (1 - y) log(1 - p)."""
    total = 0.0
    if y != 0:
        total -= y * math.log(p)
    if y != 1:
        total -= (1 - y) * math.log1p(-p)
    return total


def ordinal(y, above):
    """The log losses of "the level is above j"."""
    return sum(log_loss(1.0 if y > j else 0.0, p) for j, p in enumerate(above))


def multi_class(y, p):
    return -math.log(p[int(y)])


def squared_error(y, outputs):
    return sum((y - f) ** 2 for f in outputs) / len(outputs)


def ziln(y, outputs):
    """Wang et al. 2019: the log loss of y > 0, and the lognormal density of y."""
    p, mu, sigma = outputs
    if y == 0:
        return -math.log1p(-p)
    density = math.exp(-((math.log(y) - mu) ** 2) / (2 * sigma**2)) / (
        y * sigma * math.sqrt(2 * math.pi)
    )
    return -math.log(p) - math.log(density)


def mean(loss, labels, outputs, weights=None):
    """sum_i w_i loss_i / sum_i w_i over rows with a weight; 0 without such a row."""
    total, divisor = 0.0, 0.0
    for i, output in enumerate(outputs):
        weight = 1.0 if weights is None else float(weights[i])
        if weight == 0:
            continue
        total += weight * loss(float(labels[i]), output)
        divisor += weight
    return total / divisor if divisor else 0.0


def gradient(loss, labels, outputs, weights=None):
    """The derivatives of `mean` by the outputs, with steps relative to them."""
    outputs = np.array(outputs, "float64")
    found = np.zeros_like(outputs)
    for index in np.ndindex(outputs.shape):
        step = 1e-5 * min(abs(outputs[index]), 1.0) or 1e-6
        values = []
        for sign in (1, -1):
            moved = outputs.copy()
            moved[index] += sign * step
            values.append(mean(loss, labels, moved, weights))
        found[index] = (values[0] - values[1]) / (2 * step)
    return found


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def ordered_probabilities(row):
    """sigmoid(f_0 - sum_{i = 1..j} softplus(f_i)) for every j."""
    threshold, found = 0.0, []
    for j, f in enumerate(row):
        threshold = f if j == 0 else threshold - softplus(f)
        found.append(sigmoid(threshold))
    return found


def pairwise(of_difference, y, scores):
    """The sum over pairs with y_i > y_j of a function of s_i - s_j."""
    total = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] >= 0 and y[j] >= 0 and y[i] > y[j]:
                total += of_difference(scores[i] - scores[j])
    return total
