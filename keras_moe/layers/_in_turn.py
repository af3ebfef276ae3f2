"""Mixtures of experts that are computed in turn: the form for a TPU.

There the outputs of all experts in one tensor (n, e, u) cost more than their matmuls:
it is written, transposed, read by a batched matmul of few rows (the gates), and all of
that again for the gradient. Here every matmul is one of two matrices, and a mixture is
a sum in which the compiler reads each expert's outputs once.

Axis letters: n rows, d input features, e experts, g gates, u output units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_moe import _backend, _mesh
from keras_moe.dispatch._devices import placement
from keras_moe.experts import GLUExperts
from keras_moe.experts._mlp import StackedMLP


def fits(experts: Any, inputs: Any, training: bool | None) -> bool:
    """Whether the program that is traced may compute `experts`, or gates, in turn.

    Not if a call of them does more than to compute: both forms are traced, and
    neither may change the state of a random generator or add a loss. Experts that are
    split over devices are computed side by side.
    """
    return (
        _backend.name() == "jax"
        and _backend.is_traced(inputs)
        # Not overridden: the form in turn uses `on_rows` instead.
        and type(experts).call in (StackedMLP.call, GLUExperts.call)
        and not (training and experts.dropout > 0.0)
        and experts.activity_regularizer is None
        and not _are_split(experts)
    )


def _are_split(experts: Any) -> bool:
    """Whether the variables of experts are, or may be, split over devices."""
    if _mesh.active() is None:
        return False
    place = placement(experts)
    return place is None or place.experts is not None


def mixtures_in_turn(
    outputs: Sequence[Any],
    gates: Any,
    used: Sequence[Sequence[int]],
    compute_dtype: str,
    sum_dtype: str,
) -> list[Any]:
    """Return the g mixtures y_g = sum over i in used_g of gate_gi f_i: (..., u).

    Args:
        outputs: e tensors (..., u).
        gates: (..., g, e), maybe without the leading axes.
        used: for each gate the indices of its experts.
        compute_dtype: the dtype of gates, outputs and mixtures.
        sum_dtype: the dtype of the sum.
    """
    gates = ops.cast(ops.cast(gates, compute_dtype), sum_dtype)
    outputs = [ops.cast(ops.cast(y, compute_dtype), sum_dtype) for y in outputs]
    mixtures = []
    for g, own in enumerate(used):
        first, *others = (gates[..., g, i : i + 1] * outputs[i] for i in own)
        mixtures.append(ops.cast(sum(others, start=first), compute_dtype))
    return mixtures
