"""Backups of training from which an interrupted `fit` ends bit-identical."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras

from keras_moe import _checks
from keras_moe.callbacks import _state_file, _training_state
from keras_moe.callbacks._dataset_position import DatasetPosition
from keras_moe.callbacks._epoch_data import EpochData
from keras_moe.callbacks._skipped_batches import SkippedBatches

_KEPT = 2
_FORMAT = 2


class ExactBackup(keras.callbacks.Callback):
    """Saves the whole state of `fit`, and goes on from it after an interruption.

    Run the same program again: `fit` continues from the last backup and ends with the
    weights, metrics and history of a run that was never interrupted, bit for bit. A
    backup holds the weights, the optimizer with its learning rate, metrics, the seed
    generators of dropout and routers, loss weightings, the global generators of Python,
    NumPy, Keras and torch, the history, the states of `callbacks` and the position in
    the data. It appears whole or not at all; the one before is kept, and used if the
    last one is damaged.

    `keras.callbacks.BackupAndRestore` saves no seed generators, starts an interrupted
    epoch again with the weights of its middle, and writes over its only file.

    The order of the batches, by what `fit` reads:

    - `tf.data.Dataset`: pass its `DatasetPosition` as `data`. Without one, the order
      must be the same in every epoch.
    - `keras.utils.PyDataset`: pass it as `data` if it has the methods `get_state()`,
      called before each epoch, which returns plain values and arrays, and
      `set_state(state)`. Without them, its order must be the same in every epoch.
    - arrays: call `keras.utils.set_random_seed` at the start of the program (on
      TensorFlow, Keras then shuffles every epoch alike).

    Batches of an epoch that were used before the interruption are read again, without
    training. A `DatasetPosition` on TensorFlow does not read them again. Other
    callbacks see these batches too, with the weights and logs of the backup.

    Args:
        folder: str or path, the folder for the backups of one `fit`. The processes of
            `keras.distribution` share one.
        every_steps: int, number of batches between two backups.
        every_seconds: number >= 0, seconds between two backups; for one process.
            Without both, there is a backup at the start of every epoch but the first.
        data: what `fit` reads, see above.
        callbacks: those callbacks of `fit` that have a state, such as
            `keras.callbacks.EarlyStopping` and `FiniteGuard`: their attributes that are
            plain values or arrays are saved, but not the arguments of the constructor.
        delete_at_end: bool, whether the backups are deleted when `fit` ends.

    Place it before the other callbacks of `fit`.

    Raises:
        ValueError: if an argument is invalid; in `fit`, if the model is not built, if
            the variables of the backup have other names or shapes, if it is of other
            callbacks, more epochs, longer epochs or another number of processes, or if
            no backup in the folder is whole. Numbers in names, by which Keras counts
            them up, may differ: `dense_1`.
        TypeError: if `data` or `callbacks` are of the wrong type.

    Example:

    >>> import tempfile
    >>> x, y = np.ones((8, 3)), np.ones((8, 1))
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> stop = keras.callbacks.EarlyStopping("loss")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     backup = keras_moe.callbacks.ExactBackup(folder, callbacks=[stop])
    ...     history = model.fit(x, y, epochs=2, callbacks=[backup, stop], verbose=0)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        data: Any = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        delete_at_end: bool = True,
    ) -> None:
        super().__init__()
        self.folder = _checks.path("folder", folder)
        if every_steps is not None:
            every_steps = _checks.positive_int("every_steps", every_steps)
        if every_seconds is not None:
            every_seconds = _checks.non_negative_number("every_seconds", every_seconds)
        self._every_steps, self._every_seconds = every_steps, every_seconds
        is_position = isinstance(data, DatasetPosition)
        self._data = data if is_position else EpochData(data)
        self._callbacks = _checked_callbacks(callbacks)
        self._delete_at_end = _checks.flag("delete_at_end", delete_at_end)
        self._found: dict[str, Any] | None = None
        self._skipped: SkippedBatches | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the last whole backup."""
        self._process, self._processes = _process()
        if self._processes > 1 and self._every_seconds is not None:
            raise ValueError(
                "`every_seconds` must be None in several processes, whose clocks "
                f"differ: use `every_steps`. Received: {self._every_seconds}"
            )
        self._used = 0  # batches of the epochs before this one
        self._saved = 0, time.monotonic()
        self._logs: dict[str, Any] = {}
        self._check_model()
        SkippedBatches.end_of(self.model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                "`folder` must be a folder, or a path where one can be made. "
                f"Received: {self.folder}, which is or lies below a file"
            ) from error
        self._found = self._last_whole()
        self.model._initial_epoch = None
        if self._found is not None:
            self._check(self._found)
            self.model._initial_epoch = self._found["epoch"]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Remember, or restore, what decides the batches of this epoch."""
        self._epoch, self._in_epoch = epoch, 0
        self.model._initial_epoch = None  # `fit` has read it.
        if self._found is None:
            self._random = _training_state.random_states()
            self._data.start_epoch()
            return
        self._used, batch = self._found["used"], self._found["batch"]
        self._random = self._found["random_at_epoch"]
        # Also now: other callbacks may save the model before the batches are reached.
        _training_state.assign_variables(self.model, self._found, with_metrics=False)
        _training_state.set_random_states(self._random)
        read = self._data.restore(self._found["data"], self._used + batch, batch)
        self._skipped = SkippedBatches(self.model, read, self._found["logs"])

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Save if it is time to; restore after the last batch that is passed over."""
        if self._found is None:
            if self._is_due(batch):
                self._save(batch)
        elif batch >= self._found["batch"]:
            self._restore(self._found)
            self._found = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the batches."""
        self._in_epoch, self._logs = batch + 1, logs or {}
        self._data.advance(self._used + self._in_epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Count the batches of the epoch."""
        if self._found is not None:
            self._end_skipped()
            raise ValueError(
                "`fit` must read the data of the backup. Received: an epoch of "
                f"{self._in_epoch} batches; the backup is after {self._found['batch']} "
                f"batches of an epoch. Delete {self.folder} to start from the beginning"
            )
        self._used += self._in_epoch

    def on_train_end(self, logs: Any = None) -> None:
        """Delete the backups, if so told."""
        if self._delete_at_end and self._found is None:
            with suppress(OSError):  # such as: not empty, but for other files
                for path in self._own_files():
                    path.unlink()
                self.folder.rmdir()

    def _is_due(self, batch: int) -> bool:
        used, moment = self._saved
        if self._used + batch == 0:
            return False  # Nothing is trained yet.
        if self._every_steps is None and self._every_seconds is None:
            return batch == 0
        steps, seconds = self._used + batch - used, time.monotonic() - moment
        return (self._every_steps is not None and steps >= self._every_steps) or (
            self._every_seconds is not None and seconds >= self._every_seconds
        )

    def _save(self, batch: int) -> None:
        used = self._used + batch
        self._saved = used, time.monotonic()
        state = {
            "format": _FORMAT,
            "processes": self._processes,
            "epoch": self._epoch,
            "batch": batch,
            "used": self._used,
            "random": _training_state.random_states(),
            "random_at_epoch": self._random,
            "data": self._data.get_state(used, batch),
            "logs": {name: float(value) for name, value in self._logs.items()},
            "kinds": self._kinds(),
            "callbacks": [
                _training_state.callback_state(c) for c in self._with_history()
            ],
            **_training_state.read_variables(self.model),
        }
        try:
            _state_file.write(self._path(used), state)
        except OSError as error:
            # Better a run without a fresh backup than no run.
            warnings.warn(
                f"{self._path(used)}: no backup was written ({error.strerror}); "
                "the one before stays",
                stacklevel=2,
            )
            return
        for path in self._own_files()[:-_KEPT]:
            with suppress(OSError):  # such as: a folder of that name
                path.unlink()

    def _restore(self, state: dict[str, Any]) -> None:
        self._end_skipped()
        # Keras resets metrics at the start of an epoch, and may build them later.
        with_metrics = state["batch"] > 0
        _training_state.assign_variables(self.model, state, with_metrics)
        _training_state.set_random_states(state["random"])
        for callback, saved in zip(
            self._with_history(), state["callbacks"], strict=True
        ):
            _training_state.set_callback_state(callback, saved)
        self._saved = self._used + state["batch"], time.monotonic()

    def _with_history(self) -> list[keras.callbacks.Callback]:
        return [*self._callbacks, self.model.history]

    def _end_skipped(self) -> None:
        if self._skipped is not None:
            self._skipped.end()
            self._skipped = None

    def _kinds(self) -> list[str]:
        return [type(callback).__name__ for callback in self._callbacks]

    def _check_model(self) -> None:
        if not self.model.built:
            raise ValueError(
                "the model must be built before `fit` with `ExactBackup`: give it an "
                "`Input`, or call it on a batch. "
                f"Received: model {self.model.name!r}, which is not built"
            )
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        for callback in self._callbacks:
            names = _training_state.not_saved(callback)
            if names:
                warnings.warn(
                    f"of {type(callback).__name__} in `callbacks`, {names} cannot be "
                    "saved: make them plain lists and dicts of numbers, strings and "
                    "arrays",
                    stacklevel=2,
                )

    def _check(self, found: dict[str, Any]) -> None:
        where = f"the backup in {self.folder}"
        if found["kinds"] != self._kinds():
            raise ValueError(
                f"`callbacks` must be those of {where}: {found['kinds']}. "
                f"Received: {self._kinds()}"
            )
        epochs = self.params.get("epochs")
        if epochs is not None and found["epoch"] >= epochs:
            raise ValueError(
                f"`epochs` of `fit` must be above {found['epoch']}, the epochs that "
                f"{where} has trained. Received: epochs={epochs}"
            )

    def _path(self, used: int) -> Path:
        return self.folder / f"batch-{used:012d}-process-{self._process}.backup"

    def _own_files(self) -> list[Path]:
        return sorted(self.folder.glob(f"batch-*-process-{self._process}.backup"))

    def _last_whole(self) -> dict[str, Any] | None:
        damaged = None
        for path in reversed(self._own_files()):
            try:
                state = self._read(path)
                for other in range(self._processes):
                    # All processes go on from the same backup.
                    name = path.name.replace(
                        f"process-{self._process}.", f"process-{other}."
                    )
                    if other != self._process:
                        self._read(path.with_name(name))
            except _state_file.DamagedFileError as error:
                damaged = error
                warnings.warn(f"{error}: the backup before is used", stacklevel=2)
                continue
            return state
        if damaged is not None:
            raise ValueError(
                f"{damaged}. No other backup is whole: delete {self.folder} to start "
                "from the beginning"
            )
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        state = _state_file.read(path)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise _state_file.DamagedFileError(
                f"{path}: not a backup of this version of `ExactBackup`"
            )
        if state["processes"] != self._processes:
            raise ValueError(
                f"{path}: made by {state['processes']} processes. Received: "
                f"{self._processes}, which cannot go on from it"
            )
        return state


def _process() -> tuple[int, int]:
    """Return the index of this process and their number."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def _checked_callbacks(callbacks: Any) -> list[keras.callbacks.Callback]:
    found = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in found:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(
                "`callbacks` must be a sequence of keras.callbacks.Callback. "
                f"Received: callbacks={callbacks!r}"
            )
    return found
