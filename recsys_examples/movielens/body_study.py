"""The study of bodies: a sparse mixture against dense layers of equal cost or size.

Three rankers that differ in the layer that the tasks share: the sparse mixture, one
Dense layer with as many multiply-adds per user, and one with as many parameters. Each
has the same learning rates to choose from, judged by NDCG@10 on validation with one
seed; the test window is used with the best alone. Every result is written to its own
file, from which a study resumes.

Letters: d features of a user, e experts, k experts per user, u units, v dimensions of a
vector, t tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import keras
import numpy as np
from rich.table import Table

from recsys_examples.movielens.labels import Examples
from recsys_examples.movielens.model import TASKS, TOP_K, Settings, build_ranker
from recsys_examples.movielens.pipeline import Windows
from recsys_examples.movielens.study import (
    Metrics,
    results_on_disk,
    shared_bottom_of_equal_size,
)
from recsys_examples.movielens.training import compile_ranker
from recsys_examples.movielens.tuned import (
    best_on_validation,
    metrics_of,
    paired_difference,
)
from recsys_examples.tables import summary

RATES = (2.5e-3, 5e-3, 7.5e-3)
_BATCHES, _REPEATS = 10, 8  # of the step times


@dataclass(frozen=True)
class Studied:
    """Results of one body.

    Attributes:
        settings: the best settings on validation.
        ndcg: their NDCG@10 on validation.
        metrics: metrics of the test window, by seed.
        parameters: parameters of the ranker.
        multiply_adds: per user, in the body and the layers that read it.
        milliseconds: a training step, the fastest of its repeats.
    """

    settings: Settings
    ndcg: float
    metrics: list[Metrics]
    parameters: int
    multiply_adds: int
    milliseconds: float


def run_bodies(
    windows: Windows,
    settings: Settings,
    seeds: int,
    folder: Path,
    data_name: str,
    announce: Callable[[str], None] = print,
) -> dict[str, Studied]:
    """Tune every body on validation, then run it with every seed.

    Args:
        windows: the data.
        settings: settings of the sparse mixture; the dense bodies differ in the body
            and its width.
        seeds: number of seeds, from 0.
        folder: folder of the results, one JSON file each.
        data_name: name of the data set.
        announce: callback, called with each new result.

    Returns:
        The results by body; the sparse mixture first.
    """
    settings = replace(settings, body="moe")
    on_disk = results_on_disk(
        windows, settings, [list(RATES)], folder, data_name, announce
    )
    features = num_features(windows, settings)
    bodies = {
        "sparse MoE": settings,
        "dense, equal FLOPs": dense_of_equal_cost(settings, features),
        "dense, equal parameters": shared_bottom_of_equal_size(windows, settings),
    }
    best = {
        name: best_on_validation(
            windows,
            [replace(body, learning_rate=rate) for rate in RATES],
            _name,
            on_disk,
        )
        for name, body in bodies.items()
    }
    metrics: dict[str, list[Metrics]] = {name: [] for name in bodies}
    for seed in range(seeds):
        for name, (body, _) in best.items():
            run = partial(metrics_of, windows, body, seed)
            metrics[name].append(on_disk.get(f"{_name(body)}, seed {seed}", run))
    times = on_disk.get("milliseconds of a step", partial(_step_times, windows, bodies))
    return {
        name: Studied(
            *(body, ndcg, metrics[name]),
            parameters=_build(windows, body).training.count_params(),
            multiply_adds=multiply_adds(body, features),
            milliseconds=times[name],
        )
        for name, (body, ndcg) in best.items()
    }


def num_features(windows: Windows, settings: Settings) -> int:
    """Return d, the number of features of a user."""
    return _build(windows, settings).user.output_shape[-1]


def multiply_adds(settings: Settings, features: int) -> int:
    """Return the multiply-adds per user of a body and of the layers that read it.

    These are a vector and a level for each task. The scores of the catalogue are not
    counted: they are the same for all bodies, v for each task and movie.
    """
    heads = len(TASKS) * settings.units * (settings.dimensions + 1)
    if settings.body == "shared_bottom":
        return settings.units * features + heads
    chosen = min(TOP_K, settings.num_experts)
    router = settings.num_experts * features
    return chosen * settings.units * features + router + heads


def dense_of_equal_cost(settings: Settings, features: int) -> Settings:
    """Return settings of a shared bottom with as many multiply-adds per user."""
    one = multiply_adds(replace(settings, body="shared_bottom", units=1), features)
    width = round(multiply_adds(settings, features) / one)  # linear in the width
    return replace(settings, body="shared_bottom", units=width)


def _build(windows: Windows, settings: Settings) -> Any:
    popularity = np.zeros(len(windows.catalogue))
    users = windows.train.user_ids
    return build_ranker(windows.catalogue, users, popularity, settings)


def _name(settings: Settings) -> str:
    body = "sparse moe" if settings.body == "moe" else f"dense {settings.units}"
    return f"{body}, rate {settings.learning_rate:g}"


def _step_times(windows: Windows, bodies: Mapping[str, Settings]) -> dict[str, float]:
    """Return the milliseconds of a training step by body.

    The bodies alternate, and the fastest repeat counts: other processes only slow down.
    """
    steps = {}
    for name, settings in bodies.items():
        examples = Examples(windows.train, windows.catalogue, settings)
        model = _build(windows, settings).training
        compile_ranker(model, settings, TASKS, steps=len(examples))
        batches = [examples[i] for i in range(min(_BATCHES, len(examples) - 1))]
        steps[name] = partial(_train_on, model, batches)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + _REPEATS):
        for name, step in steps.items():
            taken[name].append(step())
    # The first repeat traces.
    return {name: 1e3 * min(seconds[1:]) for name, seconds in taken.items()}


def _train_on(model: keras.Model, batches: list[Any]) -> float:
    """Return the mean seconds of a batch."""
    started = perf_counter()
    for batch in batches:
        model.train_on_batch(*batch)
    return (perf_counter() - started) / max(len(batches), 1)


def bodies_table(title: str, found: Mapping[str, Studied]) -> Table:
    """Return a table of NDCG@10 by body, with the difference of the first to each.

    Args:
        title: title of the table.
        found: results by body.
    """
    first = next(iter(found))
    table = Table(title=title, title_justify="left")
    for heading in (
        "body",
        "parameters",
        "multiply-adds",
        "ms per step",
        "learning rate",
        "validation NDCG@10",
        "test NDCG@10",
        f"{first} minus it (standard error)",
    ):
        table.add_column(heading, justify="right")
    for name, studied in found.items():
        difference = paired_difference(found[first].metrics, studied.metrics)
        table.add_row(
            name,
            f"{studied.parameters:,}",
            f"{studied.multiply_adds:,}",
            f"{studied.milliseconds:.1f}",
            f"{studied.settings.learning_rate:g}",
            f"{studied.ndcg:.4f}",
            summary(studied.metrics, "ndcg@10"),
            "-" if name == first else difference,
        )
    return table
