"""What the studies of settings share: the best on validation, then every seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from recsys_examples.movielens.model import Settings
from recsys_examples.movielens.pipeline import Windows, run_ranker
from recsys_examples.movielens.study import Metrics, ResultsOnDisk
from recsys_examples.movielens.training import Validation, fit_ranker


def best_on_validation(
    windows: Windows,
    settings: Sequence[Settings],
    name: Callable[[Settings], str],
    on_disk: ResultsOnDisk,
    seeds: int = 1,
) -> tuple[Settings, float]:
    """Return the best of the settings, and its NDCG@10 on validation.

    Args:
        windows: the data.
        settings: those to choose from.
        name: name of settings, for the results on disk.
        on_disk: the results.
        seeds: number of seeds, from 0, whose mean counts.
    """
    tried = {
        setting: np.mean(
            [
                on_disk.get(
                    f"{name(setting)}, tuning seed {seed}",
                    partial(_validate, windows, setting, seed),
                )["validation_ndcg@10"]
                for seed in range(seeds)
            ]
        )
        for setting in settings
    }
    best = max(tried, key=tried.__getitem__)
    return best, float(tried[best])


def metrics_of(windows: Windows, settings: Settings, seed: int) -> Metrics:
    """Return the metrics of the test window."""
    return run_ranker(windows, settings, seed=seed, verbose=0).metrics


def paired_difference(one: Sequence[Metrics], other: Sequence[Metrics]) -> str:
    """Return the mean of the paired differences in NDCG@10, and its standard error."""
    pairs = zip(one, other, strict=True)
    differences = np.array([a["ndcg@10"] - b["ndcg@10"] for a, b in pairs])
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{differences.mean():+.4f} ({error:.4f})"


def comparisons(
    found: Mapping[str, Sequence[Metrics]], pairs: Iterable[tuple[str, str]]
) -> list[str]:
    """Return a line for each pair of names: one minus the other in NDCG@10.

    Args:
        found: metrics by seed, by name.
        pairs: names of models with as many seeds.
    """
    lines = []
    for one, other in pairs:
        difference = paired_difference(found[one], found[other])
        difference = difference.replace("(", "(standard error ")
        count = len(found[one])
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        lines.append(f"{one} minus {other}: NDCG@10 {difference}, {seeds}")
    return lines


def _validate(windows: Windows, settings: Settings, seed: int) -> dict[str, Any]:
    fit = fit_ranker(
        windows.train,
        windows.catalogue,
        settings,
        seed=seed,
        validation=Validation(windows.before_test, windows.validation_task),
        verbose=0,
    )
    return {"validation_ndcg@10": max(fit.curves["val_ndcg@10"]), "epochs": fit.epochs}
