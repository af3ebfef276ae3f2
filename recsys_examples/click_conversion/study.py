"""The study: each model tuned with the same budget, then run with several seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from recsys_examples.click_conversion.results import Job, Outcome, Results
from recsys_examples.click_conversion.settings import Budget
from recsys_examples.click_conversion.sources import Source
from recsys_examples.workers import Workers, use_one_thread

TUNING_SEEDS = 1_000_000  # the first seed of tuning runs, above those of the results


@dataclass(frozen=True)
class Round:
    """Runs on the same rows."""

    source: Source
    jobs: tuple[Job, ...]


class Study:
    """Runs of all models on several sources.

    Args:
        sources: the data.
        models: names of models; those that cannot learn a source's problem are left
            out there.
        budget: of each model.
        loss_weighting: name of a loss weighting or combination of gradients, or None.
        results: file of results. Runs in it are not repeated.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        models: Sequence[str],
        budget: Budget,
        loss_weighting: str | None,
        results: Results,
    ) -> None:
        self._sources, self._models = sources, models
        self._budget, self._weighting = budget, loss_weighting
        self._results = results
        grid = len(budget.learning_rates) * len(budget.epochs)
        self._tuning_seeds = budget.tuning_seeds if grid > 1 else 0

    def models(self, source: Source) -> list[str]:
        """Return the models of a source."""
        return [model for model in self._models if model in source.problem.models]

    @property
    def runs(self) -> int:
        """Total number of runs."""
        tuning = self._tuning_seeds * len(self._budget.learning_rates)
        models = sum(len(self.models(source)) for source in self._sources)
        return models * (tuning + self._budget.seeds)

    @property
    def seconds(self) -> float:
        """Duration of all runs, one after the other."""
        return self._results.seconds

    def run(self, progress: Callable[[int], None], workers: int) -> None:
        """Run what is not in the file.

        Args:
            progress: callback, called with the number of finished runs.
            workers: number of processes, of one thread each. It does not affect the
                results.

        Raises:
            InputError: if a process dies, or the file cannot be written.
        """
        work = partial(run_round, budget=self._budget, loss_weighting=self._weighting)
        done = 0
        with Workers(workers, use_one_thread) as pool:
            for wanted in (self._tuning_rounds, self._final_rounds):
                rounds = wanted()
                missing = [r for r in map(self._missing, rounds) if r.jobs]
                done += _jobs(rounds) - _jobs(missing)
                progress(done)
                for finished in pool.map(work, missing):
                    self._results.add(finished)
                    done += len(finished)
                    progress(done)

    def chosen(self, source: Source, model: str) -> tuple[float, int]:
        """Return the learning rate and the epochs with the least validation loss."""
        rates, epochs = self._budget.learning_rates, self._budget.epochs
        if not self._tuning_seeds:
            return rates[0], epochs[0]

        def loss(setting: tuple[float, int]) -> float:
            rate, count = setting
            jobs = [Job(source.name, model, rate, seed) for seed in self._tuning()]
            losses = [self._results[job].values[str(count)] for job in jobs]
            return float(np.mean([math.inf if x is None else x for x in losses]))

        return min(((rate, count) for rate in rates for count in epochs), key=loss)

    def outcomes(self, source: Source, model: str) -> list[Outcome]:
        """Return the outcomes of a model, in the order of the seeds."""
        rate, epochs = self.chosen(source, model)
        return [
            self._results[Job(source.name, model, rate, seed, epochs)]
            for seed in self._seeds()
        ]

    def _seeds(self) -> range:
        first = self._budget.first_seed
        return range(first, first + self._budget.seeds)

    def _tuning(self) -> range:
        first = TUNING_SEEDS + self._budget.first_seed
        return range(first, first + self._tuning_seeds)

    def _tuning_rounds(self) -> list[Round]:
        rounds = []
        for source in self._sources:
            for seed in self._tuning():
                jobs = tuple(
                    Job(source.name, model, rate, seed)
                    for model in self.models(source)
                    for rate in self._budget.learning_rates
                )
                rounds.append(Round(source, jobs))
        return rounds

    def _final_rounds(self) -> list[Round]:
        rounds = []
        for source in self._sources:
            chosen = {
                model: self.chosen(source, model) for model in self.models(source)
            }
            for seed in self._seeds():
                jobs = tuple(
                    Job(source.name, model, rate, seed, epochs)
                    for model, (rate, epochs) in chosen.items()
                )
                rounds.append(Round(source, jobs))
        return rounds

    def _missing(self, wanted: Round) -> Round:
        """Return a round without the runs that are in the file."""
        jobs = tuple(job for job in wanted.jobs if job not in self._results)
        return Round(wanted.source, jobs)


def run_round(
    wanted: Round, budget: Budget, loss_weighting: str | None
) -> list[tuple[Job, Outcome]]:
    """Run all jobs of a round; return their outcomes in order."""
    from recsys_examples.click_conversion.models import equal_shape
    from recsys_examples.click_conversion.training import Trainer

    source = wanted.source
    columns = source.columns()
    finished = []
    for job in wanted.jobs:
        started = time.perf_counter()
        shape, parameters = equal_shape(
            source.problem, job.model, columns, source.bottom
        )
        trainer: Trainer = _trainer(
            source.problem, job.model, columns, shape, loss_weighting, budget.batch_size
        )
        values: dict[str, float | None]
        if job.epochs:
            values = dict(trainer.test(source, job.seed, job.learning_rate, job.epochs))
        else:
            losses = trainer.losses(source, job.seed, job.learning_rate, budget.epochs)
            values = {
                str(epoch): loss if math.isfinite(loss) else None
                for epoch, loss in losses.items()
            }
        seconds = round(time.perf_counter() - started, 2)
        finished.append((job, Outcome(values, parameters, seconds)))
    return finished


@cache
def _trainer(*arguments):  # type: ignore[no-untyped-def]
    """Return this process's trainer of a model, which is traced once."""
    from recsys_examples.click_conversion.training import Trainer

    return Trainer(*arguments)


def _jobs(rounds: Sequence[Round]) -> int:
    return sum(len(r.jobs) for r in rounds)
