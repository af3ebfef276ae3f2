"""A training with every kind of state, which can be interrupted and goes on.

`python -m tests.support.interrupted FOLDER --data tf` trains, with backups in FOLDER,
and prints a hash of all final variables and the history as JSON. `--kill SECONDS` ends
the process by SIGKILL so long after the first batch, or `--since` the start of `fit` or
of a write. With `--processes` and `--address` it is one of several processes of JAX.
"""

import argparse
import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import keras
import numpy as np

from keras_moe.callbacks import DatasetPosition, ExactBackup, _state_file

ROWS, BATCH = 96, 16
MOMENTS = ("start", "batch", "write")
DATA = ("arrays", "tf", "repeated", "py_dataset", "fixed_order")


def rows():
    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
    return x, {"click": (x[:, :1] > 0).astype("float32"), "stars": x[:, 1:2]}


class Shuffled(keras.utils.PyDataset):
    """Another order every epoch, and noise in every batch."""

    def __init__(self):
        super().__init__()
        self._rng = np.random.default_rng(3)
        self.on_epoch_end()

    def __len__(self):
        return ROWS // BATCH

    def __getitem__(self, index):
        x, y = rows()
        rows_of_batch = self._order[index * BATCH : (index + 1) * BATCH]
        x = x[rows_of_batch]
        x = x + self._rng.normal(size=x.shape).astype("float32")
        return x, {task: labels[rows_of_batch] for task, labels in y.items()}

    def on_epoch_end(self):
        self._before = self._rng.bit_generator.state
        self._order = self._rng.permutation(ROWS)

    def get_state(self):
        return {"before": self._before, "now": self._rng.bit_generator.state}

    def set_state(self, state):
        self._rng.bit_generator.state = state["before"]
        self.on_epoch_end()
        self._rng.bit_generator.state = state["now"]


def make_data(kind):
    """Return what `fit` takes, and `data` of the backup."""
    x, y = rows()
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": BATCH}, None
    if kind == "py_dataset":
        dataset = Shuffled()
        return {"x": dataset, "shuffle": True}, dataset
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    if kind == "fixed_order":
        return {"x": dataset.batch(BATCH, drop_remainder=True), "shuffle": False}, None
    dataset = dataset.shuffle(ROWS, seed=4).batch(BATCH)
    position = DatasetPosition(dataset.repeat() if kind == "repeated" else dataset)
    steps = {"steps_per_epoch": 5} if kind == "repeated" else {}
    return {"x": position.dataset, "shuffle": False, **steps}, position


def make_model(loss_weighting="rlw", steps_per_execution=1):
    from keras_moe.layers import MoE, Tower
    from keras_moe.multitask import MultiTaskModel

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dropout(0.2)(keras.layers.Dense(6)(inputs))
    hidden = MoE(4, (8, 6), router="noisy_top_k", dropout=0.1)(hidden)
    hidden = MoE(4, 6, router="bias_balanced")(hidden)
    outputs = {"click": Tower((), "sigmoid")(hidden), "stars": Tower(())(hidden)}
    model = MultiTaskModel(inputs, outputs, loss_weighting=loss_weighting)
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 50)
    model.compile(
        keras.optimizers.Adam(schedule),
        {"click": "binary_crossentropy", "stars": "mse"},
        metrics={"stars": ["mae"]},
        steps_per_execution=steps_per_execution,
    )
    return model


def train(folder, data="arrays", epochs=4, callbacks=(), model=None, **backup):
    """Return a hash of all final variables, and the history."""
    model = make_model() if model is None else model
    if any(Path(folder).glob("*.backup")):
        # A training that starts over, and does not go on, is noticed.
        for variable in model.variables:
            if "float" in keras.backend.standardize_dtype(variable.dtype):
                variable.assign(variable + 1.0)
    arguments, position = make_data(data)
    plateau = keras.callbacks.EarlyStopping("loss", patience=2, start_from_epoch=1)
    kept = ExactBackup(folder, data=position, callbacks=[plateau], **backup)
    history = model.fit(
        **arguments, epochs=epochs, callbacks=[kept, *callbacks, plateau], verbose=0
    )
    variables = [*model.variables, *model.optimizer.variables]
    values = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
    content = b"".join(np.ascontiguousarray(value).tobytes() for value in values)
    return hashlib.sha256(content).hexdigest(), history.history


class KillAfter(keras.callbacks.Callback):
    """Ends the process by SIGKILL, and prints what it did: "compiling", "training".

    Args:
        seconds: so long after the moment.
        since: "start" of `fit`, the first "batch" that it trains, or the "write" after
            it. The first batch of two in an epoch: a program that goes on passes over
            batches before, and compiles the step with the first one.
    """

    def __init__(self, seconds, since="batch"):
        super().__init__()
        self._seconds, self._since, self._last = seconds, since, None
        self._is_trained = False

    def on_train_begin(self, logs=None):
        if self._since == "start":
            self._start()

    def on_train_batch_end(self, batch, logs=None):
        is_trained = logs != self._last  # The logs of those passed over are the same.
        self._last = dict(logs)
        if is_trained and batch and not self._is_trained:
            self._is_trained = True
            if self._since == "batch":
                self._start()
            if self._since == "write":
                self._start_with_a_write()

    def _start_with_a_write(self):
        write = _state_file.write

        def started(path, tree):
            self._start()
            write(path, tree)

        _state_file.write = started

    def _start(self):
        kill = threading.Timer(self._seconds, self._kill)
        kill.daemon = True
        kill.start()

    def _kill(self):
        line = json.dumps({"killed": "training" if self._is_trained else "compiling"})
        os.write(1, f"{line}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--data", choices=DATA, default="arrays")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every-steps", type=int)
    parser.add_argument("--kill", type=float)
    parser.add_argument("--since", choices=MOMENTS, default="batch")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--address")
    given = parser.parse_args()
    if given.processes > 1:
        keras.distribution.initialize(given.address, given.processes, given.process)
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    killed = [] if given.kill is None else [KillAfter(given.kill, given.since)]
    digest, history = train(
        given.folder,
        given.data,
        given.epochs,
        killed,
        every_steps=given.every_steps,
    )
    print(json.dumps({"hash": digest, "history": history}))


if __name__ == "__main__":
    main()
