"""Batches that `fit` passes over: those of the epoch before a backup."""

from __future__ import annotations

from typing import Any

import keras


class SkippedBatches:
    """Replaces the train function of a model by one that trains nothing.

    Args:
        model: the model in `fit`, after `make_train_function`.
        read: bool, whether a batch that is passed over is read.
        logs: dict, the logs of a batch that is passed over.
    """

    def __init__(self, model: keras.Model, read: bool, logs: dict[str, Any]) -> None:
        self._model, self._read, self._logs = model, read, logs
        self._train_function = model.train_function
        self._is_built = False
        backend = keras.backend.backend()
        model.train_function = {
            "tensorflow": self._on_tensorflow,
            "jax": self._on_jax,
            "torch": self._on_torch,
        }[backend]

    def end(self) -> None:
        """Put the train function back."""
        self._model.train_function = self._train_function

    @staticmethod
    def end_of(model: keras.Model) -> None:
        """Put the train function back that an interrupted `fit` left."""
        left = getattr(model.train_function, "__self__", None)
        if isinstance(left, SkippedBatches):
            left.end()

    def _on_tensorflow(self, iterator: Any) -> dict[str, Any]:
        batch = None
        if self._read:
            for _ in range(self._model.steps_per_execution):
                batch = next(iterator, batch)
        if not self._is_built:
            # Metrics are built by the first step, which is not made here. JAX and
            # torch build them before.
            if batch is None:
                batch = _empty_batch(iterator.element_spec)
            self._model._symbolic_build(data_batch=batch)
            self._is_built = True
        return dict(self._logs)

    def _on_jax(self, state: Any, iterator: Any) -> tuple[dict[str, Any], Any]:
        if self._read:
            for _ in range(self._model.steps_per_execution):
                next(iterator, None)
        return dict(self._logs), state

    def _on_torch(self, data: Any) -> dict[str, Any]:
        return dict(self._logs)


def _empty_batch(spec: Any) -> Any:
    import tensorflow as tf

    def zeros(tensor: Any) -> Any:
        shape = [1 if size is None else size for size in tensor.shape]
        return tf.zeros(shape, tensor.dtype)

    return tf.nest.map_structure(zeros, spec)
