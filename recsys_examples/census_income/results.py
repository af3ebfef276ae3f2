"""Results of finished runs, written to disk at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys_examples.census_income.models import Settings
from recsys_examples.census_income.training import Outcome
from recsys_examples.errors import InputError
from recsys_examples.records import RecordsFile


@dataclass(frozen=True)
class Job:
    """The specification of one run.

    Attributes:
        group: one of `features.GROUPS`.
        model: one of `names.CHOICES`, or `names.EQUAL_BOTTOM`.
        settings: hyperparameters.
        seed: seed of the run.
        trial: number of the search trial; None for a final run.
    """

    group: str
    model: str
    settings: Settings
    seed: int
    trial: int | None = None

    def __str__(self) -> str:
        what = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"
        return f"{self.group}, {self.model}, {what}"


class Results:
    """Outcomes of finished runs, in memory and in a file.

    Args:
        path: the file.
        depends_on: the data and versions that the outcomes depend on.
        resume: whether to continue from the outcomes in the file.

    Raises:
        InputError: as `RecordsFile`, or if a line is not an outcome.
    """

    def __init__(
        self, path: Path, depends_on: Mapping[str, Any], resume: bool = False
    ) -> None:
        self._file = RecordsFile(path, depends_on, resume)
        self._outcomes = dict(_read(*found) for found in self._file.found)

    def __len__(self) -> int:
        return len(self._outcomes)

    def get(self, job: Job) -> Outcome | None:
        """Return the outcome of a job, or None if it has not run."""
        return self._outcomes.get(_key(job))

    def add(self, job: Job, outcome: Outcome) -> None:
        """Store an outcome, in memory and on disk."""
        self._outcomes[_key(job)] = outcome
        self._file.add({"job": asdict(job), "outcome": asdict(outcome)})


def _read(where: str, record: dict[str, Any]) -> tuple[str, Outcome]:
    try:
        job = record["job"]
        made = Job(**{**job, "settings": Settings(**job["settings"])})
        return _key(made), Outcome(**record["outcome"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not a run: {json.dumps(record)}") from error


def _key(job: Job) -> str:
    return json.dumps(asdict(job), sort_keys=True)


def best_trial(outcomes: Sequence[Outcome], task: str) -> int:
    """Return the number of the trial with the best validation AUC of a task."""
    scores = [outcome.validation[task] for outcome in outcomes]
    return scores.index(max(scores))
