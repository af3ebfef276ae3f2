"""A score whose order counts within a list of candidates.

Axis letters: n lists, c candidates of a list.

The losses are those of keras-rs: `ListMLELoss`, `PairwiseLogisticLoss` and others.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.heads._base import MEAN, Head, HeadLoss

_LOSSES = {
    "list_mle": "ListMLELoss",
    "pairwise_hinge": "PairwiseHingeLoss",
    "pairwise_logistic": "PairwiseLogisticLoss",
    "pairwise_mean_squared_error": "PairwiseMeanSquaredError",
    "pairwise_soft_zero_one": "PairwiseSoftZeroOneLoss",
}


@keras.saving.register_keras_serializable("keras_moe")
class RankingLoss(HeadLoss):
    """A loss of keras-rs over the candidates of each list; the mean over lists.

    Args:
        loss: as in `Ranking`.
        reduction: as in Keras; by default the mean over the sum of the lists' weights.
        name: name of the loss.
        dtype: dtype of the computation.

    Call arguments:
        y_true: relevance, `(n, c)` or `(n, c, 1)`; a candidate below 0 is not in the
            list.
        y_pred: scores, `(n, c)` or `(n, c, 1)`.
    """

    labels_per_output = True

    def __init__(
        self,
        loss: str = "pairwise_logistic",
        reduction: str = MEAN,
        name: str = "ranking_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self._name = _checks.one_of("loss", loss, _LOSSES)
        try:
            import keras_rs
        except ImportError as error:
            raise ImportError(
                "keras_moe.multitask.heads.Ranking needs keras-rs: install it with "
                "`pip install keras-rs`"
            ) from error
        self._of_list = getattr(keras_rs.losses, _LOSSES[loss])()

    def call(self, y_true: Any, y_pred: Any) -> Any:
        losses = self._of_list.call(scores(y_true), scores(y_pred))
        return ops.sum(losses, axis=-1) if len(losses.shape) == 2 else losses

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "loss": self._name}


def scores(outputs: Any) -> Any:
    """(n, c) or (n, c, 1) -> (n, c)."""
    return ops.squeeze(outputs, axis=-1) if len(outputs.shape) == 3 else outputs


@keras.saving.register_keras_serializable("keras_moe")
class Ranking(Head):
    """Scores of the candidates of a list, compared within the list; needs keras-rs.

    A tower on features `(n, c, d)` gives scores `(n, c, 1)`. Labels (relevance >= 0)
    and sample weights are `(n, c)`. A candidate that is not defined is not in the list;
    the weight of a list is the largest of its candidates.

    Args:
        loss: "list_mle", "pairwise_hinge", "pairwise_logistic",
            "pairwise_mean_squared_error" or "pairwise_soft_zero_one".
    """

    activation = "linear"
    rule = "a finite number >= 0"
    filler = -1.0

    def __init__(self, loss: str = "pairwise_logistic") -> None:
        self._loss = _checks.one_of("loss", loss, _LOSSES)

    def loss(self) -> keras.losses.Loss:
        return RankingLoss(self._loss)

    def loss_weights(self, weights: Any) -> Any:
        """(n, c) -> (n,)."""
        return ops.max(weights, axis=-1) if len(weights.shape) == 2 else weights

    def prediction(self, outputs: Any) -> Any:
        """(n, c, 1) -> (n, c)."""
        return scores(outputs)

    def valid(self, labels: np.ndarray) -> np.ndarray:
        return np.isfinite(labels) & (labels >= 0)

    def get_config(self) -> dict[str, Any]:
        return {"loss": self._loss}
