"""Convex minimisation over x >= 0, or over the simplex, in a fixed number of steps.

Axis letters: t tasks. Leading axes are independent problems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

ITERATIONS = 18
# Each step aims at a tenth of the duality gap and keeps x and s positive.
_CENTERING = 0.1
_TO_BOUNDARY = 0.95


def minimize(
    derivatives: Callable[[Any], tuple[Any, Any]], start: Any, on_simplex: bool
) -> Any:
    """Return the minimiser of a convex function over x >= 0.

    A primal-dual interior-point method (Nocedal & Wright, 2006, chapters 16.6 and
    19.3): Newton steps on gradient(x) - s - v = 0 and x s = m, with s the multipliers
    of x >= 0, v that of sum(x) = 1 and m a tenth of the mean of x s. Its steps depend
    little on t and on the condition of the problem. The matrix of a step has a small
    multiple of the identity added, which makes it invertible and moves no solution.

    Args:
        derivatives: function of x that returns the gradient, shape `(..., t)`, and the
            Hessian, shape `(t, t)` or `(..., t, t)`, both of the order of 1.
        start: tensor of shape `(..., t)`, positive.
        on_simplex: whether sum(x) = 1 is a constraint. `start` must fulfil it.

    Returns:
        A tensor of the shape of `start`, positive.
    """
    size = start.shape[-1]
    identity = ops.eye(size, dtype=start.dtype)
    ones = ops.ones_like(start)

    def step(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        x, s = state
        gradient, hessian = derivatives(x)
        gap = x * s
        aim = _CENTERING * ops.mean(gap, axis=-1, keepdims=True)
        # Newton's equations without ds: (H + s / x) dx = v + m / x - gradient.
        matrix = hessian + (s / x + 1e-6)[..., None] * identity
        right = aim / x - gradient
        if on_simplex:
            # Changes of x have the sum 0: the added 1 has no effect but to make the
            # Hessian of a homogeneous function regular.
            both = ops.solve(matrix + 1.0, ops.stack([right, ones], axis=-1))
            dx, by_v = both[..., 0], both[..., 1]
            excess = ops.sum(x + dx, axis=-1, keepdims=True) - 1.0
            dx = dx - excess / ops.sum(by_v, axis=-1, keepdims=True) * by_v
        else:
            dx = ops.solve(matrix, right[..., None])[..., 0]
        by_x = dx / x
        by_s = aim / gap - 1.0 - by_x
        fastest = ops.max(-ops.minimum(by_x, by_s), axis=-1, keepdims=True)
        rate = _TO_BOUNDARY / ops.maximum(fastest, _TO_BOUNDARY)
        return x * (1.0 + rate * by_x), s * (1.0 + rate * by_s)

    return ops.fori_loop(0, ITERATIONS, step, (start, ones))[0]
