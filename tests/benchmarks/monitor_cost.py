"""What `ExpertMonitor` costs: the share of its observations in the time of an epoch.

`python -m tests.benchmarks.monitor_cost` trains four models for some epochs of 200
batches of 1,024 rows and observes 1,000 rows after each; the first epoch traces and is
left out.
"""

import argparse
import statistics
import time

import keras
import numpy as np

from keras_moe import callbacks, layers, multitask

WIDTH, ROWS = 256, 1024
TASKS = ["a", "b"]


def _sparse(experts):
    inputs = keras.Input((WIDTH,))
    hidden = layers.MoE(experts, (512, WIDTH))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile("adam", "mse")
    return model


def _tasks(layer):
    inputs = keras.Input((WIDTH,))
    shared = layer(inputs)
    outputs = {task: layers.Tower((64,))(shared[task]) for task in TASKS}
    model = multitask.MultiTaskModel(inputs, outputs)
    model.compile("adam", "mse")
    return model


CASES = {
    "MoE, 8 experts": lambda: _sparse(8),
    "MoE, 32 experts": lambda: _sparse(32),
    "MMoE, 8 experts, with the conflict of two tasks": lambda: _tasks(
        layers.MMoE(8, (256, 128), TASKS)
    ),
    "PLE, 2 levels, with the conflict of two tasks": lambda: _tasks(
        layers.PLE(2, 2, 2, (256, 128), TASKS)
    ),
}


class _Epochs(keras.callbacks.Callback):
    """The seconds of each epoch, with what callbacks before it do."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)


class _Observed(callbacks.ExpertMonitor):
    """Remembers how long it has taken until each epoch."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.until = []

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.until.append(self.seconds)


def share(make, epochs, steps, log_dir=None):
    """Return shares and seconds of observations, and the share of all in the fit.

    The first two are of the epochs after the first; the last is with the pictures.
    """
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(ROWS * steps, WIDTH)).astype("float32")
    model = make()
    several = isinstance(model, multitask.MultiTaskModel)
    y = {task: x[:, :1] for task in TASKS} if several else x[:, :1]
    sample = keras.tree.map_structure(lambda part: part[:1000], y) if several else None
    monitor, timed = _Observed(x[:1000], sample, log_dir=log_dir), _Epochs()
    start = time.perf_counter()
    model.fit(x, y, ROWS, epochs=epochs, callbacks=[monitor, timed], verbose=0)
    whole = monitor.seconds / (time.perf_counter() - start)
    taken = np.diff(monitor.until)
    return taken / np.array(timed.seconds[1:]), taken, whole


def main():
    """Print a line a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-dir", help="write for TensorBoard there, too")
    given = parser.parse_args()
    for name, make in CASES.items():
        shares, taken, whole = share(make, given.epochs, given.steps, given.log_dir)
        print(
            f"{name}: {statistics.median(shares):.2%} of an epoch of {given.steps} "
            f"batches ({min(shares):.2%} to {max(shares):.2%}), "
            f"{statistics.median(taken):.2f} s an observation; {whole:.2%} of the fit"
        )


if __name__ == "__main__":
    main()
