"""Training step of a model with large tables, by rows and optimizer.

    python -m tests.benchmarks.tables

All columns of ids share one table (`--columns 1` compares sizes at nearly the same
number of distinct ids in a batch). TensorFlow without XLA, or with `--xla`. All sizes
of one optimizer are measured in alternating steps in one process. A ratio is to the
time of the same optimizer with the fewest rows. Each step draws new ids.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from keras_moe import optimizers

WIDTH = 16
KINDS = {
    "keras Adam": lambda: keras.optimizers.Adam(1e-3),
    "keras Adagrad": lambda: keras.optimizers.Adagrad(1e-2),
    "keras SGD": lambda: keras.optimizers.SGD(1e-2),
    "FusedAdam": lambda: optimizers.FusedAdam(1e-3),
    "FusedAdagrad": lambda: optimizers.FusedAdagrad(1e-2),
    "LazyAdam": lambda: optimizers.LazyAdam(1e-3),
    "RowwiseAdagrad": lambda: optimizers.RowwiseAdagrad(1e-3),
}


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--rows", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7])
    add("--optimizers", nargs="+", default=["LazyAdam", "RowwiseAdagrad"])
    add("--columns", type=int, default=20)
    add("--batch", type=int, default=1024)
    add("--rounds", type=int, default=15)
    add("--xla", action="store_true")
    arguments = parser.parse_args()
    table = Table(title=f"ms a step, median of {arguments.rounds} (ratio)")
    for column in ("optimizer", *(f"{rows:,} rows" for rows in arguments.rows)):
        table.add_column(column, justify="right")
    for kind in arguments.optimizers:
        times = _times(kind, arguments)
        medians = [statistics.median(of_rows) for of_rows in times]
        cells = [f"{1e3 * m:.2f} ({m / medians[0]:.2f})" for m in medians]
        table.add_row(kind, *cells)
    Console(width=100).print(table)


def _times(kind: str, arguments: argparse.Namespace) -> list[list[float]]:
    """Return the seconds of each round, by the number of rows."""
    steps = []
    for rows in arguments.rows:
        model = _model(kind, rows, arguments.columns)
        step = tf.function(model.train_step, jit_compile=arguments.xla)
        steps.append((rows, step))
    times: list[list[float]] = [[] for _ in steps]
    rng = np.random.default_rng(0)
    y = tf.constant(rng.random((arguments.batch, 1)), "float32")
    for measured in range(-3, arguments.rounds):
        for (rows, step), found in zip(steps, times, strict=True):
            shape = (arguments.batch, arguments.columns)
            x = tf.constant(rng.integers(0, rows, shape, "int32"))
            start = time.perf_counter()
            float(step((x, y))["loss"])
            if measured >= 0:
                found.append(time.perf_counter() - start)
    return times


def _model(kind: str, rows: int, columns: int) -> Any:
    inputs = keras.Input((columns,), dtype="int32")
    table = keras.layers.Embedding(rows, WIDTH)
    hidden = keras.layers.Flatten()(table(inputs))
    hidden = keras.layers.Dense(64, "relu")(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(KINDS[kind](), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


if __name__ == "__main__":
    main()
