"""Pure functions of a Gramian, the inner products of the gradients of the tasks.

Axis letters: t tasks. Products are written as sums, because some devices multiply
float32 matrices in a lower precision.
"""

from __future__ import annotations

from typing import Any

from keras import ops


def times(matrix: Any, vector: Any) -> Any:
    """Return the product of `(..., t, t)` and `(..., t)`, shape `(..., t)`."""
    return ops.sum(matrix * vector[..., None, :], axis=-1)


def mean_over(mask: Any, dtype: str) -> Any:
    """Return the weights of a mean over the tasks in the mask, shape `(t,)`."""
    inside = ops.cast(mask, dtype)
    return inside / ops.maximum(ops.sum(inside), 1.0)


def correlations(gramian: Any) -> tuple[Any, Any, Any]:
    """Return the Gramian of the unit gradients, their norms, and which are not 0.

    Zero gradients, and tasks outside the mask, get a unit vector orthogonal to all
    others and the norm 1.
    """
    squares = ops.diagonal(gramian)
    active = squares > 0
    norms = ops.sqrt(ops.where(active, squares, 1.0))
    unit = gramian / norms[:, None] / norms[None, :]
    off_diagonal = 1.0 - ops.eye(gramian.shape[0], dtype=gramian.dtype)
    pairs = ops.logical_and(active[:, None], active[None, :])
    # The diagonal is exactly 1, also where the division rounds.
    return (
        ops.where(pairs, unit, 0.0) * off_diagonal + 1.0 - off_diagonal,
        norms,
        active,
    )
