"""The three errors of Jacobs et al. 1991 again, in plain NumPy float64.

Nothing here is shared with keras_moe. One example and one expert at a time. Axis
letters: n examples, e experts, u output units.
"""

import math

import numpy as np


def _distance(target, output):
    return sum((float(d) - float(o)) ** 2 for d, o in zip(target, output, strict=True))


def local_experts_loss(targets, outputs, weights, mask):
    """Equation 1.3, with the largest exponent factored out of the sum."""
    values = []
    for target, experts, gate in zip(targets, outputs, weights, strict=True):
        exponents = [
            math.log(p) - _distance(target, o) / 2
            for p, o in zip(gate, experts, strict=True)
            if p > 0
        ]
        largest = max(exponents)
        total = sum(math.exp(x - largest) for x in exponents)
        values.append(-largest - math.log(total))
    return np.mean(np.array(values)[mask])


def expected_squared_error(targets, outputs, weights, mask):
    """Equation 1.2."""
    values = [
        sum(p * _distance(target, o) for p, o in zip(gate, experts, strict=True))
        for target, experts, gate in zip(targets, outputs, weights, strict=True)
    ]
    return np.mean(np.array(values)[mask])


def mixture_squared_error(targets, outputs, weights, mask):
    """Equation 1.1."""
    values = [
        _distance(target, sum(p * o for p, o in zip(gate, experts, strict=True)))
        for target, experts, gate in zip(targets, outputs, weights, strict=True)
    ]
    return np.mean(np.array(values)[mask])
