"""A tf.data pipeline whose position can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    import tensorflow as tf


class DatasetPosition:
    """The position of a `tf.data.Dataset` in `fit`, for `ExactBackup`.

    Pass `dataset` of this object to `fit` and the object to `ExactBackup(data=...)`.
    A backup then holds the state of the pipeline: shuffle buffers, the orders of later
    epochs, the place in files. On TensorFlow no batch is read again after a restore; on
    JAX and torch, the batches of the current epoch that were used are read again.

    Args:
        dataset: a `tf.data.Dataset` of batches. Give `shuffle` a seed: without one, a
            program that starts again has another order.

    Attributes:
        dataset: the dataset for `fit`.

    Raises:
        TypeError: if `dataset` is not a `tf.data.Dataset`.

    Example:

    >>> import tensorflow as tf
    >>> x, y = np.zeros((64, 4), "float32"), np.zeros((64, 1), "float32")
    >>> rows = tf.data.Dataset.from_tensor_slices((x, y))
    >>> position = keras_moe.callbacks.DatasetPosition(
    ...     rows.shuffle(64, seed=1).batch(16)
    ... )
    >>> backup = keras_moe.callbacks.ExactBackup("backup", data=position)
    >>> # model.fit(position.dataset, epochs=10, callbacks=[backup], shuffle=False)
    """

    def __init__(self, dataset: tf.data.Dataset) -> None:
        import tensorflow as tf

        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(
                "`dataset` must be a tf.data.Dataset. "
                f"Received: dataset={dataset!r} of type {type(dataset).__name__}"
            )
        self.dataset = _iterated_by(self, dataset)
        self._source = dataset
        self._iterator: Any = None
        self._at_start = b""
        self._used = self._used_before = 0  # batches: until now, and at `_at_start`
        self._is_exhausted = False
        self._next: dict[str, Any] | None = None

    def start_epoch(self) -> None:
        """Nothing: the position is that of the iterator."""

    def advance(self, used: int) -> None:
        """Tell that `used` batches of all epochs were used until now."""
        self._used = used

    def get_state(self, used: int, in_epoch: int) -> dict[str, Any]:
        """Return the position.

        Args:
            used: number of batches of all epochs until now.
            in_epoch: those of them that are of this epoch.

        Raises:
            ValueError: if `fit` does not iterate over `self.dataset`, or if the state
                of the pipeline cannot be saved.
        """
        if self._iterator is None:
            raise ValueError(
                "`data` must be a DatasetPosition whose `dataset` is iterated by `fit`."
                " Received: one that is not; `fit` has another dataset, or several "
                "devices or processes share it"
            )
        if _is_known_between_batches():
            return {"iterator": _serialized(self._iterator), "is_over": False}
        used -= self._used_before
        if in_epoch == 0 and used and self._is_over(used):
            # The iteration of this epoch starts with its first batch. The state of one
            # that is over would not restore the order of the next one.
            return {"iterator": self._at_start, "is_over": True}
        return {"iterator": self._at_start, "is_over": False, "used": used}

    def restore(self, state: dict[str, Any], used: int, in_epoch: int) -> bool:
        """Make the next iteration start at the position of `get_state`.

        Returns:
            Whether the batches of this epoch are to be read again.
        """
        before = used - state.get("used", 0)
        self._next = {**state, "before": before, "skip": used - before - in_epoch}
        return not _is_known_between_batches()

    def _is_over(self, used: int) -> bool:
        cardinality = int(self._source.cardinality())
        return used == cardinality or (cardinality == -2 and self._is_exhausted)

    def _start(self) -> Iterator[Any]:
        """Return a new iteration of the dataset."""
        iterator, self._used_before = iter(self._source), self._used
        known, self._next = self._next, None
        if known is not None:
            self._used_before = known["before"]
            _restore(iterator, known["iterator"])
            if known["is_over"]:
                iterator = iter(self._source)
        self._iterator = iterator
        self._at_start = _serialized(iterator)  # if it cannot be, say so at once
        if _is_known_between_batches():
            return iterator
        self._is_exhausted = False
        for _ in range(0 if known is None else known["skip"]):
            next(iterator)
        return self._read(iterator)

    def _read(self, iterator: Iterator[Any]) -> Iterator[Any]:
        yield from iterator
        self._is_exhausted = True


def _is_known_between_batches() -> bool:
    # `fit` of JAX and torch may read batches in advance.
    return keras.backend.backend() == "tensorflow"


def _iterated_by(position: DatasetPosition, dataset: tf.data.Dataset) -> Any:
    import tensorflow as tf

    class Iterated(tf.data.Dataset):
        """The same dataset, whose iterations `position` sees."""

        def __init__(self) -> None:
            super().__init__(dataset._variant_tensor)

        def _inputs(self) -> list[Any]:
            return [dataset]

        @property
        def element_spec(self) -> Any:
            return dataset.element_spec

        def __iter__(self) -> Iterator[Any]:
            return position._start()

    return Iterated()


def _serialized(iterator: Any) -> bytes:
    import tensorflow as tf

    try:
        state = iterator._serialize_to_tensors()["_STATE"]
        return tf.io.serialize_tensor(state).numpy()
    except tf.errors.OpError as error:
        raise ValueError(
            "`data` must be a pipeline whose state can be saved, without Python "
            "generators and stateful random operations. TensorFlow says: "
            f"{error.message}"
        ) from error


def _restore(iterator: Any, position: bytes) -> None:
    import tensorflow as tf

    state = tf.io.parse_tensor(position, tf.variant)
    iterator._restore_from_tensors({"_STATE": state})
