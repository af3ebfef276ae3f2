"""The study: every model at every correlation, in several runs with different data.

As in the paper, learning rates are tuned on a grid, here per model and correlation, in
runs on other data than that of the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from recsys_examples.task_correlation.claims import Losses
from recsys_examples.task_correlation.data import make_pair
from recsys_examples.task_correlation.results import Result, ResultsFile
from recsys_examples.task_correlation.settings import Settings
from recsys_examples.task_correlation.training import Trainer
from recsys_examples.workers import Workers


@dataclass(frozen=True)
class Round:
    """Trainings on one pair of tasks: tuples (model, learning rate)."""

    correlation: float
    run: int
    tuning: bool
    trainings: tuple[tuple[str, float], ...]


class Study:
    """Runs of every model at every correlation.

    Args:
        settings: settings of all runs.
        widths: maps each model to the width of its shared layer or experts.
        correlations: values of p.
        runs: number of runs per model and p.
        file: file of results. Runs in it are not repeated.
    """

    def __init__(
        self,
        settings: Settings,
        widths: dict[str, int],
        correlations: Sequence[float],
        runs: int,
        file: ResultsFile,
    ) -> None:
        self._settings, self._widths = settings, widths
        self._correlations, self._runs = correlations, runs
        self._file = file
        self._tuning_runs = settings.tuning_runs * (len(settings.learning_rates) > 1)

    @property
    def trainings(self) -> int:
        """Total number of trainings."""
        cells = len(self._widths) * len(self._correlations)
        rates = len(self._settings.learning_rates)
        return (self._tuning_runs * rates + self._runs) * cells

    def run(self, progress: Callable[[int], None], processes: int = 1) -> None:
        """Run the trainings that are not in the file.

        Args:
            progress: callback, called with the number of finished trainings.
            processes: number of parallel processes. It does not affect the results.

        Raises:
            InputError: if a training diverges, a process dies, or the file cannot be
                written.
        """
        work = partial(train_round, settings=self._settings, widths=self._widths)
        done = 0
        with Workers(processes) as workers:
            for wanted in (self._tuning_rounds, self._study_rounds):
                rounds = wanted()
                missing = [r for r in map(self._missing, rounds) if r.trainings]
                done += _trainings(rounds) - _trainings(missing)
                progress(done)
                for results in workers.map(work, missing):
                    self._file.add(results)
                    done += len(results)
                    progress(done)

    def learning_rate(self, model: str, correlation: float) -> float:
        """Return the learning rate with the lowest mean loss over the tuning runs."""
        rates = self._settings.learning_rates
        if len(rates) == 1:
            return rates[0]

        def tuning_loss(rate: float) -> float:
            key = (model, correlation, rate, True)
            losses = [
                r.loss
                for r in self._file.results
                if (r.model, r.correlation, r.learning_rate, r.tuning) == key
            ]
            return float(np.mean(losses))

        return min(rates, key=tuning_loss)

    def losses(self) -> Losses:
        """Return the final losses by model and correlation, in order of the runs."""
        found = {
            (r.model, r.correlation, r.run): r.loss
            for r in self._file.results
            if not r.tuning
        }
        return {
            model: {
                p: np.array([found[model, p, run] for run in range(self._runs)])
                for p in self._correlations
            }
            for model in self._widths
        }

    def _tuning_rounds(self) -> list[Round]:
        rates = self._settings.learning_rates
        grid = tuple((model, rate) for model in self._widths for rate in rates)
        return [
            Round(p, run, True, grid)
            for run in range(self._tuning_runs)
            for p in self._correlations
        ]

    def _study_rounds(self) -> list[Round]:
        chosen = {
            p: tuple((model, self.learning_rate(model, p)) for model in self._widths)
            for p in self._correlations
        }
        return [
            Round(p, run, False, chosen[p])
            for run in range(self._runs)
            for p in self._correlations
        ]

    def _missing(self, wanted: Round) -> Round:
        """Return a round without the trainings that are in the file."""
        key = (wanted.correlation, wanted.run, wanted.tuning)
        done = {
            (r.model, r.learning_rate)
            for r in self._file.results
            if (r.correlation, r.run, r.tuning) == key
        }
        return Round(*key, tuple(t for t in wanted.trainings if t not in done))


def train_round(
    wanted: Round, settings: Settings, widths: dict[str, int]
) -> list[Result]:
    """Run all trainings of a round; return their results in order."""
    # The seed does not depend on the correlation, see `make_pair`.
    data_seed = [settings.seed, int(wanted.tuning), wanted.run]
    pair = make_pair(wanted.correlation, settings.recipe, data_seed)
    weight_seed = int(np.random.SeedSequence([*data_seed, 1]).generate_state(1)[0])
    results = []
    for model, rate in wanted.trainings:
        trainer = _trainer(model, widths[model], settings)
        started = time.perf_counter()
        losses = trainer.run(pair, settings.steps, rate, weight_seed)
        results.append(
            Result(
                model=model,
                correlation=wanted.correlation,
                run=wanted.run,
                learning_rate=rate,
                tuning=wanted.tuning,
                losses=losses,
                seconds=round(time.perf_counter() - started, 2),
            )
        )
    return results


@cache
def _trainer(model: str, width: int, settings: Settings) -> Trainer:
    """Return this process's trainer of a model, which is compiled once."""
    return Trainer(model, width, settings.recipe.dimension, settings.batch_size)


def _trainings(rounds: Sequence[Round]) -> int:
    return sum(len(r.trainings) for r in rounds)
