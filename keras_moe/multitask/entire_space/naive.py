"""The baseline: conversions learned from clicks alone.

L = loss(y_1, p_1) + sum_{i > 1} mean over rows with y_{i-1} = 1 of loss(y_i, p_i)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_moe.multitask.entire_space._base import EntireSpace
from keras_moe.multitask.task import Task


@keras.saving.register_keras_serializable("keras_moe")
class NaiveConversion(EntireSpace):
    """The usual model of a chain: each stage is learned where the previous happened.

    It is the baseline of `ESMM` and `ESCM2`, with the same outputs. If the rows with a
    click differ from those without, its conversion rate is learned on other rows than
    it is used on.

    Args:
        stages: the names of the events, first to last, at least two.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        inputs: as in `ESMM`.

    Returns:
        The same outputs as `ESMM`.

    Raises:
        ValueError: as in `ESMM`.

    Example:

    >>> naive = keras_moe.multitask.NaiveConversion()
    >>> p = naive({"click": np.zeros((1, 1)), "conversion": np.zeros((1, 1))})
    >>> float(p["click_and_conversion"][0, 0])
    0.25
    """

    def _declare(self, metrics: Mapping[str, Sequence[Any]]) -> list[Task]:
        later = range(1, len(self.stages))
        return [
            self._first(metrics),
            *(self._conditional(i, metrics, loss="head") for i in later),
            *(self._joint(i, metrics, loss=None) for i in later),
        ]
