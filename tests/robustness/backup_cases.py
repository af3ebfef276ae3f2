"""Damaged backups of `ExactBackup`: the one before is used, or an error names the file.

A case returns None if its outcome is right, else a description.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.robustness.damage import copied, error_fault
from tests.robustness.read_cases import Case, damaged

EPOCHS, BATCHES = 2, 3


def train(folder: Path, stop_after: int | None = None, **backup: Any) -> Any:
    """Return final weights and history of a training, or None if it was stopped."""
    import keras

    from keras_moe.callbacks import ExactBackup

    class Stop(keras.callbacks.Callback):
        seen = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.seen += 1
            if self.seen == stop_after:
                raise InterruptedError

    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dropout(0.3), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    if any(folder.glob("*.backup")):
        # A training that starts over, and does not go on, is noticed.
        model.set_weights([weight + 1.0 for weight in model.get_weights()])
    x = np.random.default_rng(0).normal(size=(4 * BATCHES, 4)).astype("float32")
    kept = ExactBackup(folder, delete_at_end=False, **backup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the backup before is used
        try:
            history = model.fit(
                x, x[:, :1], 4, EPOCHS, callbacks=[kept, Stop()], verbose=0
            )
        except InterruptedError:
            return None
    return [weight.tobytes() for weight in model.get_weights()], history.history


def backups(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """Two backups of which one is damaged, or the only one."""
    expected = train(scratch / "whole")
    two, one = scratch / "two", scratch / "one"
    # The last two are in the last epoch: what goes on from them writes no other.
    train(two, stop_after=EPOCHS * BATCHES, every_steps=1)
    names = sorted(path.name for path in two.iterdir())
    shutil.copytree(two, one)
    (one / names[0]).unlink()

    def read_two(folder: Path) -> str | None:
        return None if train(folder) == expected else "the training ended otherwise"

    def read_one(folder: Path) -> str | None:
        try:
            return read_two(folder)
        except ValueError as error:
            return error_fault(error, folder / names[1])

    reads = {two: read_two, one: read_one}
    each = [
        damaged(source, scratch / "copy", rng, read) for source, read in reads.items()
    ]
    while True:
        for cases in each:
            yield next(cases)
        for source, read in reads.items():
            yield lambda source=source, read=read: _of_another_version(
                source, scratch / "copy", names[1], read
            )


def _of_another_version(
    source: Path, scratch: Path, name: str, read: Callable[[Path], str | None]
) -> str | None:
    from keras_moe.callbacks import _state_file

    with copied(source, scratch) as copy:
        state = _state_file.read(copy / name)
        # Nothing else of it can be relied on.
        _state_file.write(copy / name, {"format": state["format"] + 1})
        try:
            fault = read(copy)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:300]
    return fault and f"{name}, another version: {fault}"
