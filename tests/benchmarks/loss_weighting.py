"""Training step of every loss weighting, relative to the plain sum of the losses.

    python -m tests.benchmarks.loss_weighting

t binary tasks on an `MMoE` with 8 experts of (64, 32), 20 features embedded in 8
dimensions (10,000 ids each), batches of 4096 rows, Adam, TensorFlow, with and without
XLA. All models of one t are measured in alternating calls in one process. A ratio of 2
means twice the time of the plain sum.
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
from rich.progress import track
from rich.table import Table

from keras_moe.layers import MMoE
from keras_moe.multitask import MultiTaskModel, Task, gradients, weighting

ROWS, FIELDS, IDS, WIDTH = 4096, 20, 10_000, 8


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    names = ["sum", *sorted(weighting.KNOWN), *sorted(gradients.KNOWN)]
    columns: dict[str, dict[str, list[float]]] = {}
    for jit in (False, True):
        for t in arguments.tasks:
            column = f"t = {t}, {'XLA' if jit else 'graph'}"
            columns[column] = _times(names, t, jit, arguments.rounds)
    table = Table(title=f"step, ratio to the sum; median of {arguments.rounds}")
    for column in ("loss weighting", *columns):
        table.add_column(column, justify="right")
    for name in names:
        cells = []
        for times in columns.values():
            pairs = zip(times[name], times["sum"], strict=True)
            ratios = sorted(mine / plain for mine, plain in pairs)
            cells.append(f"{statistics.median(ratios):.2f}")
            if name == "sum":
                cells[-1] = f"{1e3 * statistics.median(times[name]):.0f} ms"
        table.add_row(name, *cells)
    Console(width=90).print(table)


def _times(names: list[str], t: int, jit: bool, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round by name."""
    rng = np.random.default_rng(0)
    x = {f"f{i}": tf.constant(rng.integers(0, IDS, ROWS)) for i in range(FIELDS)}
    y = {f"task_{i}": tf.constant(rng.random(ROWS) < 0.2, "float32") for i in range(t)}
    steps = {}
    for name in track(names, f"compiling, t = {t}, XLA {jit}"):
        model = _model(t, None if name == "sum" else name)
        steps[name] = tf.function(model.train_step, jit_compile=jit)
        for _ in range(2):
            steps[name]((x, y))
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in track(range(rounds), "measuring"):
        for name, step in steps.items():
            start = time.perf_counter()
            float(step((x, y))["loss"])
            times[name].append(time.perf_counter() - start)
    return times


def _model(t: int, loss_weighting: Any) -> MultiTaskModel:
    keras.utils.set_random_seed(0)
    inputs = {
        f"f{i}": keras.Input((), dtype="int64", name=f"f{i}") for i in range(FIELDS)
    }
    embedded = [keras.layers.Embedding(IDS, WIDTH)(x) for x in inputs.values()]
    tasks = [Task(f"task_{i}") for i in range(t)]
    names = [task.name for task in tasks]
    shared = MMoE(8, (64, 32), names)(keras.layers.Concatenate()(embedded))
    outputs = {task.name: task.tower(16)(shared[task.name]) for task in tasks}
    model = MultiTaskModel(inputs, outputs, loss_weighting, tasks=tasks)
    model.compile("adam", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


if __name__ == "__main__":
    main()
