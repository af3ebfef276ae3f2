"""What all losses share: their float type, and rows that a mask leaves out."""

from __future__ import annotations

from typing import Any

from keras import backend, ops

from keras_moe import _checks


def as_float(values: Any) -> Any:
    values = _checks.tensor("values", values)
    wide = backend.standardize_dtype(values.dtype) == "float64"
    return ops.cast(values, "float64" if wide else "float32")


def bool_mask(mask: Any) -> Any:
    return None if mask is None else ops.cast(mask, "bool")


def masked(values: Any, mask: Any) -> Any:
    """Return `values` with zeros in the masked rows.

    Multiplying by the mask would keep a NaN of a padded row.
    """
    values = as_float(values)
    if mask is None:
        return values
    return ops.where(ops.expand_dims(mask, -1), values, ops.zeros_like(values))


def number_of_tokens(values: Any, mask: Any) -> Any:
    """Return the number of tokens in the mask, at least 1, as a divisor."""
    if mask is None:
        count = ops.cast(ops.shape(values)[0], values.dtype)
    else:
        count = ops.sum(ops.cast(mask, values.dtype))
    return ops.maximum(count, 1.0)


def mean(values: Any, mask: Any) -> Any:
    """(n,) -> the mean over the tokens in the mask."""
    tokens = number_of_tokens(values, mask)
    if mask is not None:
        values = ops.where(mask, values, ops.zeros_like(values))
    return ops.sum(values) / tokens
