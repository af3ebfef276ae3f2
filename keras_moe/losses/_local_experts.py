"""Three errors of a mixture of experts (Jacobs, Jordan, Nowlan and Hinton 1991).

Axis letters: n examples, e experts, u output units.

For one example with the target d, the outputs o_i of the experts and the weights p_i
of a gate:

    mixture_squared_error    ||d - sum_i p_i o_i||²                        (1.1)
    expected_squared_error   sum_i p_i ||d - o_i||²                        (1.2)
    local_experts_loss       -log sum_i p_i exp(-||d - o_i||² / 2)         (1.3)

In (1.1) every expert learns what the others leave over, so the experts cooperate. In
(1.2) each is compared with the target itself. In (1.3) its share of the gradient is the
probability that it produced the target, so the best expert of an example learns most.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _checks
from keras_moe.losses._masked import as_float, bool_mask, masked, mean

# About the smallest normal float32: below it, the gradient 1 / p of log p overflows.
_SMALLEST_WEIGHT = 1e-37


def local_experts_loss(
    targets: Any, expert_outputs: Any, gate_weights: Any, mask: Any = None
) -> Any:
    """Negative log likelihood of a mixture of Gaussians around the experts' outputs.

    The mean of `-log sum_i p_i exp(-||d - o_i||² / 2)`, equation 1.3 of Jacobs et al.
    The Gaussians have variance 1; divide `targets` and `expert_outputs` by a standard
    deviation for another one. Their constant, `u / 2 * log(2 pi)`, is left out, as in
    the paper.

    Args:
        targets: `(n, u)` float, d.
        expert_outputs: `(n, e, u)` float, the output o_i of every expert.
        gate_weights: `(n, e)` float, p, each row sums to 1. A weight below 1e-37 counts
            as 0: its expert gets no gradient.
        mask: `(n,)` bool, False for ignored examples. All count by default.

    Returns:
        A scalar >= 0: 0 if the experts with weight all equal the target.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n, e or u.

    Example:

    >>> outputs = np.array([[[0.0], [4.0]]])  # One example, two experts.
    >>> gate = np.array([[0.5, 0.5]])
    >>> loss = keras_moe.losses.local_experts_loss(np.array([[4.0]]), outputs, gate)
    >>> np.isclose(float(loss), -np.log(0.5 + 0.5 * np.exp(-8))).item()
    True

    References:
        - [Jacobs, Jordan, Nowlan and Hinton, 1991: Adaptive Mixtures of Local Experts](
          https://doi.org/10.1162/neco.1991.3.1.79)
    """
    targets, outputs, weights, mask = _prepared(
        targets, expert_outputs, gate_weights, mask
    )
    has_weight = weights >= _SMALLEST_WEIGHT
    log_weights = ops.where(
        has_weight,
        ops.log(ops.where(has_weight, weights, ops.ones_like(weights))),
        -1e30,  # Finite, so that a row without any weight has no NaN in its gradient.
    )
    errors = _squared_errors(targets, outputs)
    return mean(-ops.logsumexp(log_weights - errors / 2, axis=-1), mask)


def expected_squared_error(
    targets: Any, expert_outputs: Any, gate_weights: Any, mask: Any = None
) -> Any:
    """The expected squared error of one expert that the gate draws for each example.

    The mean of `sum_i p_i ||d - o_i||²`, equation 1.2 of Jacobs et al.

    Args:
        targets: `(n, u)` float, d.
        expert_outputs: `(n, e, u)` float, the output o_i of every expert.
        gate_weights: `(n, e)` float, p, each row sums to 1.
        mask: `(n,)` bool, False for ignored examples. All count by default.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n, e or u.

    Example:

    >>> outputs = np.array([[[0.0], [4.0]]])  # One example, two experts.
    >>> target, gate = np.array([[2.0]]), np.array([[0.5, 0.5]])
    >>> float(keras_moe.losses.expected_squared_error(target, outputs, gate))
    4.0

    References:
        - [Jacobs, Jordan, Nowlan and Hinton, 1991: Adaptive Mixtures of Local Experts](
          https://doi.org/10.1162/neco.1991.3.1.79)
    """
    targets, outputs, weights, mask = _prepared(
        targets, expert_outputs, gate_weights, mask
    )
    errors = _squared_errors(targets, outputs)
    return mean(ops.sum(weights * errors, axis=-1), mask)


def mixture_squared_error(
    targets: Any, expert_outputs: Any, gate_weights: Any, mask: Any = None
) -> Any:
    """The squared error of the weighted sum of the experts' outputs.

    The mean of `||d - sum_i p_i o_i||²`, equation 1.1 of Jacobs et al.: the sum over
    the units, where `keras.losses.MeanSquaredError` has their mean.

    Args:
        targets: `(n, u)` float, d.
        expert_outputs: `(n, e, u)` float, the output o_i of every expert.
        gate_weights: `(n, e)` float, p, each row sums to 1.
        mask: `(n,)` bool, False for ignored examples. All count by default.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n, e or u.

    Example:

    >>> outputs = np.array([[[0.0], [4.0]]])  # One example, two experts.
    >>> target, gate = np.array([[2.0]]), np.array([[0.5, 0.5]])
    >>> float(keras_moe.losses.mixture_squared_error(target, outputs, gate))
    0.0

    References:
        - [Jacobs, Jordan, Nowlan and Hinton, 1991: Adaptive Mixtures of Local Experts](
          https://doi.org/10.1162/neco.1991.3.1.79)
    """
    targets, outputs, weights, mask = _prepared(
        targets, expert_outputs, gate_weights, mask
    )
    mixture = ops.sum(ops.expand_dims(weights, -1) * outputs, axis=1)  # (n, u)
    return mean(ops.sum(ops.square(targets - mixture), axis=-1), mask)


def _prepared(targets: Any, outputs: Any, weights: Any, mask: Any) -> tuple[Any, ...]:
    """Check the arguments; return them as floats of one type, with zeros in padding."""
    _checks.axes(
        targets=(targets, "nu"),
        expert_outputs=(outputs, "neu"),
        gate_weights=(weights, "ne"),
        mask=(mask, "n?"),
    )
    mask = bool_mask(mask)
    targets, outputs, weights = map(as_float, (targets, outputs, weights))
    # float64 only if all are: a float32 tensor has no more digits.
    kinds = {x.dtype for x in (targets, outputs, weights)}
    if len(kinds) > 1:
        targets, outputs, weights = (
            ops.cast(x, "float32") for x in (targets, outputs, weights)
        )
    rows_of_experts = None if mask is None else ops.expand_dims(mask, -1)
    return (
        masked(targets, mask),
        masked(outputs, rows_of_experts),
        masked(weights, mask),
        mask,
    )


def _squared_errors(targets: Any, outputs: Any) -> Any:
    """(n, u), (n, e, u) -> (n, e): ||d - o_i||²."""
    return ops.sum(ops.square(ops.expand_dims(targets, 1) - outputs), axis=-1)
