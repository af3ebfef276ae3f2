"""Results of finished runs, written to disk at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys_examples.errors import InputError
from recsys_examples.records import RecordsFile


@dataclass(frozen=True)
class Job:
    """The specification of one run.

    Attributes:
        source: name of the data source.
        model: one of `settings.MODELS`.
        learning_rate: learning rate of Adam.
        seed: seed of the data or their split, and of the weights.
        epochs: number of epochs; 0 for a tuning run, which reports several.
    """

    source: str
    model: str
    learning_rate: float
    seed: int
    epochs: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        values: of a tuning run the validation loss by number of epochs (null if it
            diverged), else the metrics of test rows.
        parameters: number of trainable parameters.
        seconds: duration.
    """

    values: dict[str, float | None]
    parameters: int
    seconds: float


class Results:
    """Outcomes in memory and in a file.

    Args:
        path: the file.
        depends_on: what the outcomes depend on, such as data and versions.
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

    def __contains__(self, job: Job) -> bool:
        return job in self._outcomes

    def __getitem__(self, job: Job) -> Outcome:
        return self._outcomes[job]

    def add(self, finished: Iterable[tuple[Job, Outcome]]) -> None:
        """Append outcomes; those of one call are written together."""
        new = dict(finished)
        self._file.add(
            *({"job": asdict(j), "outcome": asdict(o)} for j, o in new.items())
        )
        self._outcomes |= new

    @property
    def seconds(self) -> float:
        """Duration of all runs, one after the other."""
        return sum(outcome.seconds for outcome in self._outcomes.values())


def _read(where: str, record: dict[str, Any]) -> tuple[Job, Outcome]:
    try:
        return Job(**record["job"]), Outcome(**record["outcome"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not a run: {json.dumps(record)}") from error
