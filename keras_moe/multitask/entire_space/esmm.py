"""ESMM: conversions learned from all impressions, through the product with the click.

Axis letters: n rows, s stages.

L = loss(y_1, p_1) + sum_{i > 1} loss(y_1 ... y_i, p_1 ... p_i)  (Ma et al. 2018, eq. 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_moe.multitask.entire_space._base import EntireSpace
from keras_moe.multitask.task import Task


@keras.saving.register_keras_serializable("keras_moe")
class ESMM(EntireSpace):
    """Entire-space multi-task model of a chain of events.

    The conversion rate among clicks has no loss of its own: it is learned through
    P(click and conversion) = P(click) P(conversion | click), on all impressions, as no
    impression without a click has an unknown label for the product. It is an output,
    ready for serving. With three stages it is the chain of Wen et al. (2020) without
    its branches.

    Args:
        stages: the names of the events, first to last, at least two. `y` has a label
            with each name; after a stage that did not happen, labels may be NaN.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        inputs: dict by stage of logits of the conditional probabilities, `(n, 1)`, each
            from a tower without activation.

    Returns:
        A dict of probabilities `(n, 1)` in float32: for each stage the conditional
        one, with the stage's name, and for each stage but the first that of all stages
        up to it, named such as "click_and_conversion".

    Raises:
        ValueError: if `stages` or the keys of the inputs are invalid.

    Example:

    >>> inputs = keras.Input((8,))
    >>> shared = keras_moe.layers.MMoE(4, 16, ["click", "conversion"])(inputs)
    >>> esmm = keras_moe.multitask.ESMM()
    >>> outputs = esmm({k: keras_moe.layers.Tower(8)(v) for k, v in shared.items()})
    >>> list(outputs)
    ['click', 'conversion', 'click_and_conversion']
    >>> model = keras_moe.multitask.MultiTaskModel(
    ...     inputs, outputs, tasks=esmm.declared_tasks({"conversion": ["auc"]})
    ... )
    >>> model.compile("adam")
    >>> y = {"click": np.array([1, 0]), "conversion": np.array([1, np.nan])}
    >>> history = model.fit(np.ones((2, 8)), y, verbose=0)

    References:
        - [Ma et al., 2018: Entire Space Multi-Task Model: An Effective Approach for
          Estimating Post-Click Conversion Rate](https://arxiv.org/abs/1804.07931)
        - [Wen et al., 2020: Entire Space Multi-Task Modeling via Post-Click Behavior
          Decomposition for Conversion Rate Prediction](
          https://arxiv.org/abs/1910.07099)
    """

    def _declare(self, metrics: Mapping[str, Sequence[Any]]) -> list[Task]:
        later = range(1, len(self.stages))
        return [
            self._first(metrics),
            *(self._conditional(i, metrics, loss=None) for i in later),
            *(self._joint(i, metrics, loss="head") for i in later),
        ]
