"""The study: the same number of trials for every model, then the seeds of the best.

A trial is chosen by the validation AUC of the main task alone; the test rows are only
reported. At the end a shared bottom gets the size of the best layer, and a search of
its own.
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

# Does jobs, in any order, and gives each back with its outcome.
Runner = Callable[[Sequence[Job]], Iterator[tuple[Job, Outcome]]]
# Is told of each job that is done and kept, and whether it was just now.
Announce = Callable[[Job, Outcome, bool], None]

# Trials have seeds apart from those of the table.
_FIRST_TRIAL_SEED = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What a study runs.

    Attributes:
        groups: some of `features.GROUPS`.
        models: some of `names.CHOICES`.
        trials: of the search, for each model and group.
        seeds: runs of each model with the settings that were found.
        equal_bottom: whether to add a shared bottom of the best layer's size.
        first_seed: the seed of the search, and the first one of the runs.
    """

    groups: Sequence[str]
    models: Sequence[str]
    trials: int
    seeds: int
    equal_bottom: bool = False
    first_seed: int = 0

    @property
    def runs(self) -> int:
        """How many runs there are in all."""
        models = len(self.models) + self.equal_bottom
        return len(self.groups) * models * (self.trials + self.seeds)


@dataclass(frozen=True)
class Found:
    """What the study found for one model in one group.

    Attributes:
        settings: of the best trial.
        outcomes: with these settings, by seed.
    """

    settings: Settings
    outcomes: Sequence[Outcome]

    def validation(self, task: str) -> float:
        """Return the mean validation AUC of a task over the seeds."""
        return float(np.mean([outcome.validation[task] for outcome in self.outcomes]))

    def test(self, task: str) -> list[float]:
        """Return the test AUC of a task by seed."""
        return [outcome.test[task] for outcome in self.outcomes]


# By model.
Table = dict[str, Found]


def best_layer(table: Mapping[str, Found], task: str) -> str | None:
    """Return the model, no baseline, that is best on validation; None if none is."""
    layers = [model for model in table if model not in BASELINES]
    return max(layers, key=lambda m: table[m].validation(task), default=None)


class Study:
    """Runs a plan, and takes up what is done.

    Args:
        plan: what to run.
        splits: the rows.
        results: where outcomes are kept.
        runner: does the runs that are missing.
        announce: told of each run, also of those that are taken up.
    """

    def __init__(
        self,
        plan: Plan,
        splits: Splits,
        results: Results,
        runner: Runner,
        announce: Announce = lambda job, outcome, just_now: None,
    ) -> None:
        self._plan, self._splits = plan, splits
        self._results, self._runner = results, runner
        self._announce = announce

    def run(self) -> Iterator[tuple[str, Table]]:
        """Run one group after the other; yield the name of each, and its table."""
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
        """Give each trial of a shared bottom the size of the best layer's model.

        The table of categories has the best layer's size as well: else it would be
        the most of some trials' parameters.
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
        self._do(_in_turn(trials.values()))
        runs = {}
        for model, jobs in trials.items():
            chosen = best_trial([self._outcome(job) for job in jobs], main)
            runs[model] = [
                Job(group, model, candidates[model][chosen], plan.first_seed + i)
                for i in range(plan.seeds)
            ]
        self._do(_in_turn(runs.values()))
        return {
            model: Found(jobs[0].settings, [self._outcome(job) for job in jobs])
            for model, jobs in runs.items()
        }

    def _do(self, jobs: Sequence[Job]) -> None:
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


def _in_turn(jobs: Iterable[Sequence[Job]]) -> list[Job]:
    """Take the first jobs of all models, then the second ones, and so on.

    A study that is stopped then has as many trials of one model as of another.
    """
    return list(chain.from_iterable(zip(*jobs, strict=True)))
