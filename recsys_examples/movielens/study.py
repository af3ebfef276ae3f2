"""The study: several models over several seeds, evaluated on the test window.

Every result is written to its own file, from which an interrupted study resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recsys_examples.movielens import baselines
from recsys_examples.movielens.fusion import fused_scorer
from recsys_examples.movielens.model import TASKS, Settings, build_ranker
from recsys_examples.movielens.pipeline import Windows, run_ranker
from recsys_examples.movielens.ranking import Scorer, rank
from recsys_examples.movielens.tuning import tune
from recsys_examples.runs import CHECKSUM, read_json, versions, write_json

MODELS = ("MMoE", "shared bottom", "single-task", "ALS", "item-kNN", "popularity")
Metrics = dict[str, float]


def shared_bottom_of_equal_size(windows: Windows, settings: Settings) -> Settings:
    """Return settings of a shared bottom with as many parameters as the MMoE."""

    def parameters(candidate: Settings) -> int:
        popularity = np.zeros(len(windows.catalogue))
        users = windows.train.user_ids
        ranker = build_ranker(windows.catalogue, users, popularity, candidate)
        return ranker.training.count_params()

    # The number of parameters is linear in the width.
    target = parameters(settings)
    counts = {
        w: parameters(replace(settings, body="shared_bottom", units=w)) for w in (1, 2)
    }
    width = 1 + round((target - counts[1]) / (counts[2] - counts[1]))
    return replace(settings, body="shared_bottom", units=width)


def run_study(
    windows: Windows,
    settings: Settings,
    seeds: int,
    folder: Path,
    data_name: str,
    announce: Callable[[str], None] = print,
) -> dict[str, list[Metrics]]:
    """Run every model with every seed.

    Args:
        windows: the data.
        settings: settings of the MMoE; the other rankers differ only in their body.
        seeds: number of seeds, from 0. Deterministic models run once.
        folder: folder of the results, one JSON file each.
        data_name: name of the data set. Results of other data, settings, grids or
            package versions are not reused.
        announce: callback, called with each new result.

    Returns:
        The metrics of each seed, by model.
    """
    grids = [baselines.ALS_GRID, baselines.KNN_GRID]
    on_disk = results_on_disk(windows, settings, grids, folder, data_name, announce)
    scorers = _tuned_baselines(windows, on_disk, data_name)
    bottom = shared_bottom_of_equal_size(windows, settings)

    def ranked(scorer: Scorer) -> Metrics:
        return rank(scorer, windows.test_task)

    def factorised(seed: int) -> Metrics:
        return ranked(scorers["ALS"](seed=seed))

    def trained(body: Settings, seed: int) -> Metrics:
        return run_ranker(windows, body, seed=seed, verbose=0).metrics

    results: dict[str, list[Metrics]] = {model: [] for model in MODELS}
    for seed in range(seeds):
        runs: dict[str, Callable[[], Metrics]] = {
            "MMoE": partial(trained, settings, seed),
            "shared bottom": partial(trained, bottom, seed),
            "single-task": partial(_single_tasks, windows, settings, seed),
            "ALS": partial(factorised, seed),
        }
        for model, run in runs.items():
            results[model].append(on_disk.get(f"{model}, seed {seed}", run))
    results["item-kNN"].append(ranked(scorers["item-kNN"]()))
    results["popularity"].append(ranked(scorers["popularity"]()))
    return results


def results_on_disk(
    windows: Windows,
    settings: Settings,
    grids: list[Any],
    folder: Path,
    data_name: str,
    announce: Callable[[str], None],
) -> ResultsOnDisk:
    """Return the results in `folder` that depend on the same data and arguments."""
    depends_on = {
        "data": data_name,
        "ratings": _fingerprint(windows),
        "settings": asdict(settings),
        "grids": grids,
        "versions": versions("keras-moe", "keras", "tensorflow", "implicit"),
    }
    return ResultsOnDisk(folder, depends_on, announce)


def _tuned_baselines(
    windows: Windows, results: ResultsOnDisk, data_name: str
) -> dict[str, Callable[..., Scorer]]:
    """Tune ALS and item-kNN on validation; return functions that fit each baseline."""

    def tuned(make: Callable[..., Scorer], grid: tuple, name: str) -> dict[str, Any]:
        found = tune(windows, make, grid, name, data_name)
        return {
            "settings": found.settings,
            "validation_ndcg@10": found.ndcg,
            "tried": found.tried,
        }

    als = results.get(
        "ALS, tuned", lambda: tuned(baselines.als, baselines.ALS_GRID, "ALS")
    )
    knn = results.get(
        "item-kNN, tuned",
        lambda: tuned(baselines.item_knn, baselines.KNN_GRID, "item-kNN"),
    )
    als_settings = baselines.ALSSettings(*als["settings"])
    watched = windows.before_test.matrix(len(windows.catalogue))
    return {
        "ALS": partial(baselines.als, watched, als_settings),
        "item-kNN": partial(baselines.item_knn, watched, knn["settings"]),
        "popularity": partial(baselines.popularity, watched),
    }


def _fingerprint(windows: Windows) -> str:
    """Return a hash of all ratings."""
    digest = hashlib.sha256()
    for part in (windows.before_test, windows.test):
        for field in fields(part):
            digest.update(getattr(part, field.name).tobytes())
    return digest.hexdigest()


def _single_tasks(windows: Windows, settings: Settings, seed: int) -> Metrics:
    """Train one model per task; rank by the fused scores of watch and like."""
    metrics: Metrics = {}
    scorers = []
    for task in TASKS:
        outcome = run_ranker(windows, settings, tasks=(task,), seed=seed, verbose=0)
        metrics |= outcome.metrics
        if task in ("watch", "like"):
            scorers.append(
                fused_scorer(outcome.fit.ranker, windows.before_test, windows.catalogue)
            )

    def fused(users: np.ndarray) -> np.ndarray:
        return np.sum([scorer(users) for scorer in scorers], axis=0)

    return metrics | rank(fused, windows.test_task)


class ResultsOnDisk:
    """Results on disk, one file per name and dependencies."""

    def __init__(
        self, folder: Path, depends_on: dict, announce: Callable[[str], None]
    ) -> None:
        self._folder, self._depends_on = folder, depends_on
        self._announce = announce

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Read a result from disk, or compute and write it."""
        key = json.dumps([name, self._depends_on], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        path = (
            self._folder / f"{name.replace(', ', '-').replace(' ', '-')}-{digest}.json"
        )
        if path.exists():
            found = read_json(path, "remove it to compute it again")
            if found.pop(CHECKSUM, None):  # else of an earlier version
                return found
        keras.backend.clear_session()  # frees the previous models
        result = make()
        write_json(path, result)
        self._announce(f"{name}: {_shown(result)}")
        return result


def _shown(result: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
    )
