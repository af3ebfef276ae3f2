"""A SavedModel of a Keras model: written, loaded without Keras' classes, and called."""

from __future__ import annotations

import importlib
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.benchmarks.click_rows import Sizes, draw
from tests.benchmarks.workload import Workload


def make(module: str, model: str, experts: int, batch: int, calls: int) -> Workload:
    """Return the latency of the SavedModel of a model.

    Args:
        module: a module with `build(model, experts, sizes)`.
        model: its first argument.
        experts: its second.
        batch: rows of a call.
        calls: calls of a round.
    """
    sizes = Sizes(rows=batch)
    built = importlib.import_module(module).build(model, experts, sizes)
    with tempfile.TemporaryDirectory() as folder:
        built.export(folder, verbose=False)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        loaded = tf.saved_model.load(folder)
    signature = loaded.signatures["serving_default"]
    columns, _ = draw(sizes)
    _, specs = signature.structured_input_signature
    inputs = {
        name: tf.reshape(tf.constant(columns[name], spec.dtype), _shape(spec, batch))
        for name, spec in specs.items()
    }

    def call() -> float:
        start = time.perf_counter()
        for output in signature(**inputs).values():
            output.numpy()
        return time.perf_counter() - start

    def measure(_: int) -> dict[str, float]:
        for _ in range(3):
            call()
        seconds = [call() for _ in range(calls)]
        middle, late = np.quantile(seconds, [0.5, 0.99])
        return {"seconds": middle, "p99, ms": 1e3 * late, "size, MiB": size / 2**20}

    # `loaded` is kept, since its signatures do not keep its variables.
    return Workload(measure=measure, packages=("tensorflow",), kept=loaded)


def _shape(spec: tf.TensorSpec, batch: int) -> list[int]:
    return [batch, *spec.shape[1:]]
