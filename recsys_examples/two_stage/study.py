"""The study: the pipeline and the MovieLens example's full ranking, several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from recsys_examples.errors import InputError
from recsys_examples.movielens import model as movielens
from recsys_examples.movielens.pipeline import Windows, run_ranker
from recsys_examples.records import RecordsFile
from recsys_examples.two_stage.pipeline import fit_first_stages, run_second_stage
from recsys_examples.two_stage.settings import RANKERS, Settings

FULL = "full catalogue"
NAMES = {"mmoe": "two stages, MMoE", "ple": "two stages, PLE"}
Metrics = dict[str, float]


class Study:
    """The MovieLens example's ranker and the pipeline with both rankers, per seed.

    Args:
        windows: the data.
        settings: settings of the pipeline.
        full: settings of the MovieLens example's model.
        file: file of results. Runs in it are not repeated.
    """

    def __init__(
        self,
        windows: Windows,
        settings: Settings,
        full: movielens.Settings,
        file: RecordsFile,
    ) -> None:
        self._windows, self._settings, self._full = windows, settings, full
        self._file = file
        self._found = {_key(record, where): record for where, record in file.found}

    def run(self, seeds: int, announce: Callable[[str], None]) -> None:
        """Run the seeds and models that are not in the file."""
        for seed in range(seeds):
            if (FULL, seed) not in self._found:
                keras.backend.clear_session()  # frees the previous models
                outcome = run_ranker(self._windows, self._full, seed=seed, verbose=0)
                self._keep(announce, FULL, seed, metrics=outcome.metrics)
            missing = [r for r in RANKERS if (NAMES[r], seed) not in self._found]
            if not missing:
                continue
            keras.backend.clear_session()
            stages = fit_first_stages(self._windows, self._settings, seed)
            for ranker in missing:
                settings = replace(self._settings, ranker=ranker)
                found = run_second_stage(self._windows, stages, settings, seed)
                self._keep(
                    announce,
                    NAMES[ranker],
                    seed,
                    metrics=found.metrics,
                    chosen=found.chosen,
                    funnel=found.funnel,
                )

    def _keep(
        self, announce: Callable[[str], None], model: str, seed: int, **found: Any
    ) -> None:
        record = {"model": model, "seed": seed, **found}
        self._file.add(record)
        self._found[model, seed] = record
        announce(f"seed {seed}, {model}: NDCG@10 {found['metrics']['ndcg@10']:.4f}")

    def metrics(self, seeds: int) -> dict[str, list[Metrics]]:
        """Return the metrics of each seed, by model."""
        return {
            name: [self._found[name, seed]["metrics"] for seed in range(seeds)]
            for name in (FULL, *NAMES.values())
        }


def paired(metrics: Sequence[Metrics], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference in NDCG@10 over seeds, and its standard error."""
    difference = np.array([m["ndcg@10"] for m in metrics]) - np.array(other)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return float(difference.mean()), float(error)


def _key(record: dict[str, Any], where: str) -> tuple[str, int]:
    if not {"model", "seed", "metrics"} <= record.keys():
        raise InputError(f"{where}: not a result of this study")
    return record["model"], record["seed"]
