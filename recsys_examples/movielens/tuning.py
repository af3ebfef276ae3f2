"""Tuning of a baseline on the validation window.

Every setting is fitted on the training window and ranks the validation window; the one
with the highest NDCG@10 is selected. The test window is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.progress import track

from recsys_examples.movielens import baselines
from recsys_examples.movielens.data import DEFAULT_NAME
from recsys_examples.movielens.ranking import Scorer, rank

if TYPE_CHECKING:
    from recsys_examples.movielens.pipeline import Windows


@dataclass(frozen=True)
class Tuned:
    """The best settings of a baseline.

    Attributes:
        settings: the best of the settings tried.
        ndcg: their NDCG@10 on validation; None if they were found in another run.
        tried: number of settings tried.
        planned: number of settings in the grid.
        seconds: duration of the tuning.
        data: name of the data set.
    """

    settings: Any
    ndcg: float | None
    tried: int
    planned: int
    seconds: float
    data: str


def tune(
    windows: Windows,
    make: Callable[..., Scorer],
    grid: Sequence[Any],
    name: str,
    data_name: str,
    budget_s: float = math.inf,
) -> Tuned:
    """Find the best settings on validation, within a time budget.

    Args:
        windows: the data.
        make: function of a watched matrix (u, i) and settings that returns a scorer.
        grid: the settings, tried in this order.
        name: name of the baseline, for the progress bar.
        data_name: name of the data set.
        budget_s: seconds. The first settings are always tried; further ones only if
            there is time for the slowest so far.
    """
    watched = windows.train.matrix(len(windows.catalogue))
    started = before = perf_counter()
    scores: list[float] = []
    slowest = 0.0
    for settings in track(grid, f"tuning {name}"):
        if scores and before - started + slowest > budget_s:
            break
        scorer = make(watched, settings)
        scores.append(rank(scorer, windows.validation_task)["ndcg@10"])
        now = perf_counter()
        slowest, before = max(slowest, now - before), now
    best = max(range(len(scores)), key=scores.__getitem__)
    return Tuned(
        settings=grid[best],
        ndcg=scores[best],
        tried=len(scores),
        planned=len(grid),
        seconds=before - started,
        data=data_name,
    )


def als_for(windows: Windows, data_name: str, seed: int, budget_s: float) -> Tuned:
    """Return the settings of ALS for a data set.

    For the default data these are the best of the whole grid, found by `--study`. For
    other data, including a part of the default data, ALS is tuned over
    `baselines.SMALL_ALS_GRID`.

    Args:
        windows: the data.
        data_name: `MovieLens.name`.
        seed: seed of the factors.
        budget_s: time budget in seconds.
    """
    if data_name == DEFAULT_NAME:
        count = len(baselines.ALS_GRID)
        return Tuned(baselines.TUNED_ALS, None, count, count, 0.0, DEFAULT_NAME)
    make = partial(baselines.als, seed=seed)
    grid = baselines.SMALL_ALS_GRID
    return tune(windows, make, grid, "ALS", data_name, budget_s)


def als_summary(tuned: Tuned, budget_s: float) -> str:
    """Return one line on how the settings of ALS were found."""
    if tuned.ndcg is None:
        return f"ALS: settings tuned on the default data ({tuned.tried} settings)."
    if tuned.tried == tuned.planned:
        return (
            f"ALS: best of {tuned.tried} settings on validation, {tuned.seconds:.0f} s."
        )
    progress = (
        f"{tuned.tried} of {tuned.planned} settings on validation, "
        f"{tuned.seconds:.0f} s (time budget: {budget_s:g} s)"
    )
    if tuned.tried == 1:
        return f"ALS: {progress}: not tuned on this data; the comparison is not fair."
    return f"ALS: best of {progress}."


def als_record(tuned: Tuned) -> dict[str, Any]:
    """Return the same information for the metrics file of a run."""
    return {
        "settings": tuned.settings._asdict(),
        "tuned_on": tuned.data,
        "tried": tuned.tried,
        "planned": tuned.planned,
        "validation_ndcg@10": tuned.ndcg,
        "seconds": round(tuned.seconds, 1),
    }
