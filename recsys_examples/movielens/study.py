"""Several models over several seeds: mean ± standard deviation on the test window.

Every result is a file of its own, so a study that was stopped goes on where it was.
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
from recsys_examples.runs import versions, write_json

MODELS = ("MMoE", "shared bottom", "single-task", "ALS", "item-kNN", "popularity")
Metrics = dict[str, float]


def shared_bottom_of_equal_size(windows: Windows, settings: Settings) -> Settings:
    """Choose the width at which a shared bottom has the MMoE's parameter count."""

    def parameters(candidate: Settings) -> int:
        popularity = np.zeros(len(windows.catalogue))
        users = windows.train.user_ids
        ranker = build_ranker(windows.catalogue, users, popularity, candidate)
        return ranker.training.count_params()

    # The count is a straight line in the width: two points give it.
    target = parameters(settings)
    at = {
        w: parameters(replace(settings, body="shared_bottom", units=w)) for w in (1, 2)
    }
    width = 1 + round((target - at[1]) / (at[2] - at[1]))
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
        settings: of the MMoE; the other models have the same but for their body.
        seeds: number of seeds, from 0. Models without chance run once.
        folder: where the results are kept, one JSON file each.
        data_name: which data this is. Results of other data, settings, grids or
            package versions are not taken up.
        announce: told of each result as it comes.

    Returns:
        By model, the metrics of each seed.
    """
    bottom = shared_bottom_of_equal_size(windows, settings)
    depends_on = {
        "data": data_name,
        "ratings": _fingerprint(windows),
        "settings": asdict(settings),
        "grids": [baselines.ALS_GRID, baselines.KNN_GRID],
        "versions": versions("keras-moe", "keras", "tensorflow", "implicit"),
    }
    kept = _Results(folder, depends_on, announce)

    def tuned(make: Callable[..., Scorer], grid: tuple, name: str) -> dict[str, Any]:
        found = tune(windows, make, grid, name, data_name)
        return {
            "settings": found.settings,
            "validation_ndcg@10": found.ndcg,
            "tried": found.tried,
        }

    als = kept.get(
        "ALS, tuned", lambda: tuned(baselines.als, baselines.ALS_GRID, "ALS")
    )
    knn = kept.get(
        "item-kNN, tuned",
        lambda: tuned(baselines.item_knn, baselines.KNN_GRID, "item-kNN"),
    )
    als_settings = baselines.ALSSettings(*als["settings"])
    watched = windows.before_test.matrix(len(windows.catalogue))

    def ranked(scorer: Scorer) -> Metrics:
        return rank(scorer, windows.test_task)

    def factorised(seed: int) -> Metrics:
        return ranked(baselines.als(watched, als_settings, seed))

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
            results[model].append(kept.get(f"{model}, seed {seed}", run))
    results["item-kNN"].append(ranked(baselines.item_knn(watched, knn["settings"])))
    results["popularity"].append(ranked(baselines.popularity(watched)))
    return results


def _fingerprint(windows: Windows) -> str:
    """Tell ratings apart by what is in them."""
    digest = hashlib.sha256()
    for part in (windows.before_test, windows.test):
        for field in fields(part):
            digest.update(getattr(part, field.name).tobytes())
    return digest.hexdigest()


def _single_tasks(windows: Windows, settings: Settings, seed: int) -> Metrics:
    """One model a task, each with its own body; ranked by the fused scores of two."""
    metrics: Metrics = {}
    scorers = []
    for task in TASKS:
        outcome = run_ranker(windows, settings, tasks=(task,), seed=seed, verbose=0)
        metrics |= outcome.metrics
        if task in ("watch", "like"):
            scorers.append(
                fused_scorer(outcome.fit.ranker, windows.before_test, windows.catalogue)
            )

    def together(users: np.ndarray) -> np.ndarray:
        return np.sum([scorer(users) for scorer in scorers], axis=0)

    return metrics | rank(together, windows.test_task)


class _Results:
    """Results on disk, by name and by what they depend on."""

    def __init__(
        self, folder: Path, depends_on: dict, announce: Callable[[str], None]
    ) -> None:
        self._folder, self._depends_on = folder, depends_on
        self._announce = announce

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Read a result, or make it and keep it."""
        key = json.dumps([name, self._depends_on], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        path = (
            self._folder / f"{name.replace(', ', '-').replace(' ', '-')}-{digest}.json"
        )
        if path.exists():
            return json.loads(path.read_text())
        keras.backend.clear_session()  # the models before this one are done
        result = make()
        write_json(path, result)
        self._announce(f"{name}: {_shown(result)}")
        return result


def _shown(result: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
    )
