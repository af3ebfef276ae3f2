"""The study: equal search budgets for all models, then several seeds of the best trial.

The best trial has the highest validation AUC of the main task; test results are not
used for selection. Finally, a shared bottom with as many parameters as the best layer
is tuned with the same budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from recsys_examples.census_income.features import GROUPS, Splits
from recsys_examples.census_income.models import (
    Settings,
    build_models,
    of_equal_size,
    parameters,
)
from recsys_examples.census_income.names import BASELINES, EQUAL_BOTTOM
from recsys_examples.census_income.results import Job, Results, best_trial
from recsys_examples.census_income.search import draw
from recsys_examples.census_income.training import Outcome

# Runs jobs in any order; yields each with its outcome.
Runner = Callable[[Sequence[Job]], Iterator[tuple[Job, Outcome]]]
# Called with each job, its stored outcome, and whether it ran in this session.
Announce = Callable[[Job, Outcome, bool], None]

# Search trials and final runs have different seeds.
_FIRST_TRIAL_SEED = 1_000_000


@dataclass(frozen=True)
class Plan:
    """The runs of a study.

    Attributes:
        groups: names from `features.GROUPS`.
        models: names from `names.CHOICES`.
        trials: number of search trials per model and group.
        seeds: number of final runs per model and group.
        equal_bottom: whether to add a shared bottom of the best layer's size.
        first_seed: seed of the search and of the first final run.
    """

    groups: Sequence[str]
    models: Sequence[str]
    trials: int
    seeds: int
    equal_bottom: bool = False
    first_seed: int = 0

    @property
    def runs(self) -> int:
        """Total number of runs."""
        models = len(self.models) + self.equal_bottom
        return len(self.groups) * models * (self.trials + self.seeds)


@dataclass(frozen=True)
class Found:
    """The result of one model in one group.

    Attributes:
        settings: settings of the best trial.
        outcomes: outcomes of the final runs, one per seed.
    """

    settings: Settings
    outcomes: Sequence[Outcome]

    def validation(self, task: str) -> float:
        """Return the mean validation AUC of a task over the seeds."""
        return float(np.mean([outcome.validation[task] for outcome in self.outcomes]))

    def test(self, task: str) -> list[float]:
        """Return the test AUC of a task, one per seed."""
        return [outcome.test[task] for outcome in self.outcomes]


Table = dict[str, Found]  # by model


def best_layer(table: Mapping[str, Found], task: str) -> str | None:
    """Return the non-baseline model with the best validation AUC, or None."""
    layers = [model for model in table if model not in BASELINES]
    return max(layers, key=lambda m: table[m].validation(task), default=None)


class Study:
    """Runs a plan, except for the runs that are already in the results.

    Args:
        plan: the runs.
        splits: the encoded rows.
        results: store of the outcomes.
        runner: runs the missing jobs.
        announce: callback for each run, including those already in the results.
    """

    def __init__(
        self,
        plan: Plan,
        splits: Splits,
        results: Results,
        runner: Runner,
        announce: Announce = lambda job, outcome, is_new: None,
    ) -> None:
        self._plan, self._splits = plan, splits
        self._results, self._runner = results, runner
        self._announce = announce

    def run(self) -> Iterator[tuple[str, Table]]:
        """Run the groups in order; yield the name and table of each."""
        for group in self._plan.groups:
            main = GROUPS[group].main
            table = self._search_and_run(
                group, {model: self._trials(model) for model in self._plan.models}
            )
            best = best_layer(table, main)
            if self._plan.equal_bottom and best:
                equal = {EQUAL_BOTTOM: self._equal_trials(group, best, table[best])}
                table |= self._search_and_run(group, equal)
            yield group, table

    def _trials(self, model: str) -> list[Settings]:
        seed = self._plan.first_seed
        return [draw(model, trial, seed) for trial in range(self._plan.trials)]

    def _equal_trials(self, group: str, best: str, found: Found) -> list[Settings]:
        """Return trials of a shared bottom with as many parameters as the best model.

        They use the best model's embedding size: otherwise the embedding table would
        have most of the parameters in some trials.
        """
        target = self._parameters(group, best, found.settings)

        def count(settings: Settings) -> int:
            return self._parameters(group, EQUAL_BOTTOM, settings)

        return [
            of_equal_size(
                replace(settings, embedding=found.settings.embedding), target, count
            )
            for settings in self._trials(EQUAL_BOTTOM)
        ]

    def _parameters(self, group: str, model: str, settings: Settings) -> int:
        rows = self._splits.train
        return parameters(
            build_models(
                model,
                settings,
                GROUPS[group].tasks,
                self._splits.table_rows,
                rows.codes.shape[1],
                rows.numbers.shape[1],
            )
        )

    def _search_and_run(
        self, group: str, candidates: Mapping[str, Sequence[Settings]]
    ) -> Table:
        main = GROUPS[group].main
        plan = self._plan
        trials = {
            model: [
                Job(group, model, s, _FIRST_TRIAL_SEED + plan.first_seed + i, trial=i)
                for i, s in enumerate(settings)
            ]
            for model, settings in candidates.items()
        }
        self._run_missing(_interleaved(trials.values()))
        runs = {}
        for model, jobs in trials.items():
            chosen = best_trial([self._outcome(job) for job in jobs], main)
            runs[model] = [
                Job(group, model, candidates[model][chosen], plan.first_seed + i)
                for i in range(plan.seeds)
            ]
        self._run_missing(_interleaved(runs.values()))
        return {
            model: Found(jobs[0].settings, [self._outcome(job) for job in jobs])
            for model, jobs in runs.items()
        }

    def _run_missing(self, jobs: Sequence[Job]) -> None:
        missing = []
        for job in jobs:
            earlier = self._results.get(job)
            if earlier is None:
                missing.append(job)
            else:
                self._announce(job, earlier, False)
        for job, outcome in self._runner(missing):
            self._results.add(job, outcome)
            self._announce(job, outcome, True)

    def _outcome(self, job: Job) -> Outcome:
        outcome = self._results.get(job)
        assert outcome is not None, f"not run: {job}"
        return outcome


def _interleaved(jobs: Iterable[Sequence[Job]]) -> list[Job]:
    """Return the first job of each model, then the second of each, and so on.

    An interrupted study then has about as many trials of each model.
    """
    return list(chain.from_iterable(zip(*jobs, strict=True)))
