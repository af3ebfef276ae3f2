"""Training and test of a Keras model on the Census-Income rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.benchmarks import keras_steps
from tests.benchmarks.census_rows import TASKS, CensusRows, Sizes, aucs
from tests.benchmarks.workload import Workload


def workload(
    build: Callable[[int], Any],
    rows: CensusRows,
    epochs: int,
    packages: tuple[str, ...],
) -> Workload:
    """Return the measurement of one seed a round.

    Args:
        build: function of a seed that returns a compiled model; its outputs are a
            dict by task or a list in the order of the tasks.
        rows: training and test rows.
        epochs: how often to train on all rows.
        packages: whose versions are reported.
    """
    import keras

    sizes = Sizes()

    def measure(number: int) -> dict[str, float]:
        keras.backend.clear_session()
        keras.utils.set_random_seed(number)
        model = build(number)
        labels = _like_outputs(model, rows.train.labels)
        few = slice(sizes.rows)
        start = model.get_weights()
        # Compiles; the weights and the optimizer start anew.
        model.train_on_batch(
            {name: column[few] for name, column in rows.train.columns.items()},
            _like_outputs(model, {t: y[few] for t, y in rows.train.labels.items()}),
        )
        model.set_weights(start)
        for variable in model.optimizer.variables:
            if "learning_rate" not in variable.path:
                variable.assign(np.zeros(variable.shape, variable.dtype))
        started = time.perf_counter()
        model.fit(
            rows.train.columns,
            labels,
            batch_size=sizes.rows,
            epochs=epochs,
            verbose=0,
        )
        seconds = time.perf_counter() - started
        found = model.predict(rows.test.columns, batch_size=8192, verbose=0)
        scores = (
            found if isinstance(found, dict) else dict(zip(TASKS, found, strict=True))
        )
        return {"seconds": seconds, **aucs(rows.test, scores)}

    parameters = keras_steps.count_parameters(build(0))
    return Workload(measure=measure, parameters=parameters, packages=packages)


def _like_outputs(model: Any, labels: dict[str, np.ndarray]) -> Any:
    """Return labels in the structure of the outputs."""
    if isinstance(model.output, dict):
        return labels
    ordered: Sequence[np.ndarray] = [labels[task] for task in TASKS]
    return list(ordered)
