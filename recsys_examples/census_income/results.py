"""Finished runs on disk: one line of JSON each, only ever added to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys_examples.census_income.models import Settings
from recsys_examples.census_income.training import Outcome
from recsys_examples.errors import InputError
from recsys_examples.runs import make_folder


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        group: one of `features.GROUPS`.
        model: one of `models.MODELS`, or `models.EQUAL_BOTTOM`.
        settings: sizes and rates.
        seed: of the run.
        trial: its number if it is a trial of the search.
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
    """Outcomes of finished runs, in memory and in a file of their own.

    Args:
        folder: where the file is made, named by the time. Files of earlier runs are
            not changed.
        depends_on: on what data and versions all outcomes depend; those of others are
            not taken up.
        resume: whether to take up what the folder's other files hold.

    Raises:
        InputError: if the folder cannot be read or written.
    """

    def __init__(
        self, folder: Path, depends_on: Mapping[str, Any], resume: bool = False
    ) -> None:
        make_folder(folder)
        self._depends_on = dict(depends_on)
        self._outcomes: dict[str, Outcome] = {}
        try:
            earlier = sorted(folder.glob("*.jsonl")) if resume else []
            for path in earlier:
                self._take_up(path)
            self.path = _new_file(folder)
        except OSError as error:
            raise InputError(
                f"cannot use the output folder {folder}: {error.strerror}"
            ) from error

    def __len__(self) -> int:
        return len(self._outcomes)

    def get(self, job: Job) -> Outcome | None:
        """Return the outcome of a job that is done, or None."""
        return self._outcomes.get(_key(job))

    def add(self, job: Job, outcome: Outcome) -> None:
        """Keep an outcome, in memory and on disk."""
        self._outcomes[_key(job)] = outcome
        line = json.dumps(
            {"job": asdict(job), "outcome": asdict(outcome), **self._depends_on}
        )
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _take_up(self, path: Path) -> None:
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                job, outcome = _job(record["job"]), Outcome(**record["outcome"])
            except (ValueError, KeyError, TypeError):
                continue  # the run was stopped while it wrote this line
            if all(record.get(k) == v for k, v in self._depends_on.items()):
                self._outcomes[_key(job)] = outcome


def _new_file(folder: Path) -> Path:
    stem = time.strftime("%Y-%m-%dT%H-%M-%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = folder / f"{stem}{suffix}.jsonl"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise OSError(f"no free name for {stem}.jsonl")


def _job(record: dict[str, Any]) -> Job:
    return Job(**{**record, "settings": Settings(**record["settings"])})


def _key(job: Job) -> str:
    return json.dumps(asdict(job), sort_keys=True)


def best_trial(outcomes: Sequence[Outcome], task: str) -> int:
    """Return the number of the trial with the best validation AUC of a task."""
    scores = [outcome.validation[task] for outcome in outcomes]
    return scores.index(max(scores))
