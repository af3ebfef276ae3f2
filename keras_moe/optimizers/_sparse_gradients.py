"""Keras' treatment of gradients, exact for sparse ones with repeated rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe.optimizers import _tensorflow


class SparseGradients(keras.optimizers.Optimizer):
    """Base class: sparse gradients (`tf.IndexedSlices`) stay sparse until the update.

    Repeated rows are summed before a gradient is clipped, so that its norm is that of
    the dense gradient.
    """

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if self.loss_scale_factor is not None:
            # Keras divides by the scale with `/`, which IndexedSlices lack.
            grads = [
                _tensorflow.divisible(g) if _tensorflow.is_sparse(g) else g
                for g in grads
            ]
        super().apply(grads, trainable_variables)

    def _clip_gradients(self, grads: Sequence[Any]) -> list[Any]:
        if not (self.clipnorm or self.global_clipnorm or self.clipvalue):
            return list(grads)
        grads = [
            _tensorflow.with_repeated_summed(g) if _tensorflow.is_sparse(g) else g
            for g in grads
        ]
        # The rows that are not there are zeros: they change no norm.
        values = [g.values if _tensorflow.is_sparse(g) else g for g in grads]
        return [
            _tensorflow.with_values(g, clipped) if _tensorflow.is_sparse(g) else clipped
            for g, clipped in zip(grads, super()._clip_gradients(values), strict=True)
        ]
