"""The results of training runs, written to disk at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys_examples.errors import InputError
from recsys_examples.records import RecordsFile

_TYPES = {
    "model": str,
    "correlation": float,
    "run": int,
    "learning_rate": float,
    "tuning": bool,
    "losses": list,
    "seconds": float,
}


@dataclass(frozen=True)
class Result:
    """The result of one training run.

    Attributes:
        model: one of `models.BODIES`.
        correlation: correlation p of the two tasks.
        run: number of the run, from 0. Runs with the same number have the same data.
        learning_rate: learning rate of Adam.
        tuning: whether the run belongs to the learning-rate search, which uses other
            data than the study.
        losses: mean squared error of each task on the test rows.
        seconds: duration of the run.
    """

    model: str
    correlation: float
    run: int
    learning_rate: float
    tuning: bool
    losses: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> float:
        """The final loss: the mean over the tasks."""
        return sum(self.losses) / len(self.losses)


class ResultsFile:
    """Results in memory and in a file.

    Args:
        path: the file. Missing folders are created.
        depends_on: JSON object of what the results depend on, such as versions.
        resume: whether to continue from the results in the file.

    Attributes:
        results: all results so far, in the order in which they were added.

    Raises:
        InputError: as `RecordsFile`, or if a line is not a result.
    """

    def __init__(self, path: Path, depends_on: dict[str, Any], resume: bool) -> None:
        self._file = RecordsFile(path, depends_on, resume)
        self.results = [_result(record, where) for where, record in self._file.found]

    def add(self, results: Iterable[Result]) -> None:
        """Append results; those of one call are written together."""
        new = list(results)
        self._file.add(*(asdict(result) for result in new))
        self.results += new


def _result(record: dict[str, Any], where: str) -> Result:
    if {name: type(field) for name, field in record.items()} != _TYPES:
        raise InputError(f"{where}: not a result: {json.dumps(record)}")
    losses = tuple(record["losses"])
    finite = (isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    if not losses or not all(finite):
        raise InputError(f"{where}: losses must be finite numbers; got {losses}")
    return Result(**{**record, "losses": losses})
