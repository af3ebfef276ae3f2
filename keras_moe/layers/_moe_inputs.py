"""The call arguments of `MoE` as tokens: leading axes flattened, padding zeroed.

Axis letters: n tokens, d input features.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import routing as routing_lib
from keras_moe._layer import given_or_attached
from keras_moe.layers._parts import check_leading_axes, checked_batch


def tokens(inputs: Any, mask: Any) -> tuple[Any, Any]:
    """(..., d) and a mask of the leading axes, or None -> (n, d) and (n,) or None."""
    rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
    mask = given_or_attached(mask, inputs)
    if mask is None:
        return rows, None
    mask = ops.convert_to_tensor(mask)
    check_leading_axes("mask", mask.shape, inputs.shape, features=0)
    mask = ops.reshape(ops.cast(mask, "bool"), (-1,))
    # Values in padding, including NaN, must not reach outputs or gradients.
    return routing_lib.rows_where(mask, rows), mask


def router_inputs(given: Any, inputs: Any) -> Any:
    """Flatten the leading axes of `given`; integer ids have no feature axis."""
    ids = len(given.shape) < len(inputs.shape)
    features = 0 if ids else 1
    check_leading_axes("router_inputs", given.shape, inputs.shape, features)
    given = checked_batch("router_inputs", given, inputs)
    return ops.reshape(given, (-1,) if ids else (-1, given.shape[-1]))


def router_shape(
    router: Any, inputs_shape: tuple[int | None, ...], router_inputs_shape: Any
) -> tuple[int | None, ...]:
    """Return the shape of the router's inputs, flattened."""
    if router_inputs_shape is None:
        # Custom routers may lack this attribute.
        if getattr(router, "reads_ids", False):
            raise ValueError(
                "`router_inputs` must be given for the router "
                f"{type(router).__name__}, which reads integer ids instead of "
                "features. Received: router_inputs=None"
            )
        return (None, inputs_shape[-1])
    if len(router_inputs_shape) < len(inputs_shape):
        return (None,)  # Ids.
    return (None, router_inputs_shape[-1])
