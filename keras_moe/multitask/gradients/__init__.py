"""Gradients of several tasks combined to one, by weights from their inner products.

Axis letters: t tasks.

A `GradientWeighting` maps the Gramian of the tasks' gradients by the shared parameters,
shape `(t, t)`, to the weights w of the update sum_i w_i g_i, shape `(t,)`.
"""

from __future__ import annotations

from typing import Any

from keras_moe.multitask import _weighting_layer
from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients.aligned_mtl import AlignedMTL
from keras_moe.multitask.gradients.cagrad import CAGrad
from keras_moe.multitask.gradients.imtl_g import IMTLG
from keras_moe.multitask.gradients.mgda import MGDA
from keras_moe.multitask.gradients.nash_mtl import NashMTL
from keras_moe.multitask.gradients.pcgrad import PCGrad
from keras_moe.multitask.gradients.upgrad import UPGrad

__all__ = [
    "IMTLG",
    "KNOWN",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "GradientWeighting",
    "NashMTL",
    "PCGrad",
    "UPGrad",
    "get",
]

KNOWN: dict[str, type[GradientWeighting]] = {
    "aligned_mtl": AlignedMTL,
    "cagrad": CAGrad,
    "imtl_g": IMTLG,
    "mgda": MGDA,
    "nash_mtl": NashMTL,
    "pcgrad": PCGrad,
    "upgrad": UPGrad,
}


def get(identifier: Any) -> GradientWeighting | None:
    """Return the gradient weighting specified by `identifier`.

    Args:
        identifier: None, a name in `keras_moe.multitask.gradients.KNOWN`, a config from
            `keras.saving.serialize_keras_object`, or a gradient weighting, which is
            returned unchanged.

    Returns:
        A `GradientWeighting`, or None for None.

    Raises:
        ValueError: if `identifier` is none of these.

    Example:

    >>> weighting = keras_moe.multitask.gradients.get("cagrad")
    >>> weighting.c
    0.5
    """
    return _weighting_layer.find(
        identifier, KNOWN, GradientWeighting, "a GradientWeighting"
    )
