"""Training step of `MMoE(top_k=)`, relative to that with dense gates.

    python -m tests.benchmarks.sparse_mmoe

Two tasks, e experts of 256 -> 512 -> 256, 8192 rows, TensorFlow, with and without XLA.
The layers of one e are measured in alternating calls in the same process; "step" is the
forward and backward pass, with gradients of the inputs and all weights. A share of 0.25
is a quarter of the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from keras_moe.layers import MMoE

ROWS, FEATURES, EXPERT_UNITS, TASKS = 8192, 256, (512, 256), 2
KINDS = {"dense gates": None, "top 2": 2, "top 1": 1}


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(ROWS, FEATURES)).astype("float32"))
    table = Table(title=f"step, ms and share; median of {arguments.rounds}")
    for column in ("compiler", "e", *KINDS):
        table.add_column(column, justify="right")
    for jit in (False, True):
        for e in arguments.experts:
            medians = _medians(e, jit, x, arguments.rounds)
            table.add_row(
                "XLA" if jit else "graph",
                str(e),
                *(f"{1e3 * m:.0f} ({m / medians[0]:.2f})" for m in medians),
            )
    Console(width=90).print(table)


def _medians(e: int, jit: bool, x: Any, rounds: int) -> list[float]:
    steps = []
    for top_k in KINDS.values():
        layer = MMoE(num_experts=e, expert_units=EXPERT_UNITS, tasks=TASKS, top_k=top_k)
        layer(x)
        steps.append(tf.function(_step(layer), jit_compile=jit))
        steps[-1](x)  # Compile.
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step(x)[0].numpy()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def _step(layer: MMoE) -> Any:
    def step(x: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.add_n([tf.reduce_sum(tf.square(y)) for y in layer(x)])
        return tape.gradient(loss, [x, *(w.value for w in layer.trainable_variables)])

    return step


if __name__ == "__main__":
    main()
