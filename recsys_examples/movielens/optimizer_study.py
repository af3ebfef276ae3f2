"""The study of optimizers: one ranker, several seeds, each learning rate tuned.

Every optimizer has as many settings to choose from. A setting is judged by the mean of
the best NDCG@10 on validation over the tuning seeds; the test window is used with the
best alone. Every result is written to its own file, from which a study resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from rich.table import Table

from recsys_examples.movielens.model import Settings
from recsys_examples.movielens.pipeline import Windows
from recsys_examples.movielens.study import Metrics, results_on_disk
from recsys_examples.movielens.tuned import (
    best_on_validation,
    metrics_of,
    paired_difference,
)
from recsys_examples.tables import summary

TUNING_SEEDS = 1
# (learning rate, multiplier of the tables); the latter counts in `OF_TABLES` alone.
ADAM_GRID = [(rate, 10.0) for rate in (2.5e-3, 3.75e-3, 5e-3, 7.5e-3)]
GRIDS = {
    "adam": ADAM_GRID,
    "fused_adam": ADAM_GRID,
    "lazy_adam": list(product((2.5e-3, 5e-3), (2.0, 5.0))),
    "rowwise_adagrad": list(product((2.5e-3, 5e-3), (10.0, 30.0))),
}
OF_TABLES = ("lazy_adam", "rowwise_adagrad")


@dataclass(frozen=True)
class Studied:
    """Results of one optimizer.

    Attributes:
        settings: the best settings on validation.
        ndcg: their NDCG@10 on validation, the mean over the tuning seeds.
        metrics: metrics of the test window, by seed.
    """

    settings: Settings
    ndcg: float
    metrics: list[Metrics]


def run_optimizers(
    windows: Windows,
    settings: Settings,
    optimizers: Sequence[str],
    seeds: int,
    folder: Path,
    data_name: str,
    announce: Callable[[str], None] = print,
) -> dict[str, Studied]:
    """Tune every optimizer on validation, then run it with every seed.

    Args:
        windows: the data.
        settings: settings of the ranker.
        optimizers: names, from `GRIDS`.
        seeds: number of seeds, from 0.
        folder: folder of the results, one JSON file each.
        data_name: name of the data set.
        announce: callback, called with each new result.

    Returns:
        The results by optimizer.
    """
    on_disk = results_on_disk(windows, settings, [], folder, data_name, announce)
    found = {}
    for name in optimizers:
        grid = _grid(replace(settings, optimizer=name))
        best, ndcg = best_on_validation(windows, grid, _name, on_disk, TUNING_SEEDS)
        metrics = [
            on_disk.get(
                f"{_name(best)}, seed {seed}", partial(metrics_of, windows, best, seed)
            )
            for seed in range(seeds)
        ]
        found[name] = Studied(best, ndcg, metrics)
    return found


def _grid(settings: Settings) -> list[Settings]:
    return [
        replace(settings, learning_rate=rate, table_multiplier=multiplier)
        for rate, multiplier in GRIDS[settings.optimizer]
    ]


def _name(settings: Settings) -> str:
    name = f"{settings.optimizer}, rate {settings.learning_rate:g}"
    if settings.optimizer in OF_TABLES:
        return f"{name}, tables {settings.table_multiplier:g}"
    return name


def optimizers_table(title: str, found: dict[str, Studied]) -> Table:
    """Return a table of NDCG@10 by optimizer, with the paired difference to the first.

    Args:
        title: title of the table.
        found: results by optimizer.
    """
    first = next(iter(found))
    table = Table(title=title, title_justify="left")
    headings = (
        "optimizer",
        "learning rate (of tables)",
        "validation NDCG@10",
        "test NDCG@10",
        f"minus {first} (standard error)",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, studied in found.items():
        rate = studied.settings.learning_rate
        rates = f"{rate:g}"
        if name in OF_TABLES:
            rates += f" ({rate * studied.settings.table_multiplier:g})"
        difference = paired_difference(studied.metrics, found[first].metrics)
        table.add_row(
            name,
            rates,
            f"{studied.ndcg:.4f}",
            summary(studied.metrics, "ndcg@10"),
            "-" if name == first else difference,
        )
    return table
