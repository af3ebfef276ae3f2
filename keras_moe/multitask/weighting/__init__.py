"""Weights for the total of several task losses.

Axis letters: t tasks.

A `LossWeighting` maps the losses of the tasks, shape `(t,)`, to the total loss.
`GradNorm` needs the gradients of the tasks as well: it is a
`keras_moe.multitask.gradients.GradientWeighting` whose weights multiply the losses.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_moe.multitask import _weighting_layer
from keras_moe.multitask.weighting._base import LossWeighting
from keras_moe.multitask.weighting.decay import DecayingWeighting
from keras_moe.multitask.weighting.dwa import DWA
from keras_moe.multitask.weighting.famo import FAMO
from keras_moe.multitask.weighting.fixed import FixedWeighting
from keras_moe.multitask.weighting.gradnorm import GradNorm
from keras_moe.multitask.weighting.rlw import RLW
from keras_moe.multitask.weighting.uncertainty import UncertaintyWeighting

__all__ = [
    "DWA",
    "FAMO",
    "KNOWN",
    "RLW",
    "DecayingWeighting",
    "FixedWeighting",
    "GradNorm",
    "LossWeighting",
    "UncertaintyWeighting",
    "get",
]

# Names for `get`. The other weightings have arguments without a default.
KNOWN: dict[str, type] = {
    "famo": FAMO,
    "gradnorm": GradNorm,
    "rlw": RLW,
    "uncertainty": UncertaintyWeighting,
}


def get(identifier: Any) -> Any:
    """Return the loss weighting specified by `identifier`.

    Args:
        identifier: None, a name in `keras_moe.multitask.weighting.KNOWN`, a config from
            `keras.saving.serialize_keras_object`, or a layer, which is returned
            unchanged.

    Returns:
        A layer, or None for None.

    Raises:
        ValueError: if `identifier` is none of these.

    Example:

    >>> weighting = keras_moe.multitask.weighting.get("famo")
    >>> weighting.learning_rate
    0.025
    """
    return _weighting_layer.find(
        identifier, KNOWN, keras.layers.Layer, "a weighting layer"
    )
