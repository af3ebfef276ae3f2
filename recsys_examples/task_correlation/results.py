"""The results of a study, kept as they come."""

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
    """What one training run came to.

    Attributes:
        model: one of `models.BODIES`.
        correlation: p of the two tasks.
        run: number of the run, from 0. Runs of one number have the same data.
        learning_rate: of Adam.
        tuning: whether the run is one of those that choose the learning rate, which
            have data of their own.
        losses: mean squared error of each task on its test rows.
        seconds: what the run took.
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
    """Results that are kept as they come.

    Args:
        path: the file. Its folder is made where there is none.
        depends_on: what the results depend on, as JSON can hold it.
        resume: whether to go on from the results that are there.

    Attributes:
        results: all results so far, in the order of their coming.

    Raises:
        InputError: as `RecordsFile` does, or if a line is no result.
    """

    def __init__(self, path: Path, depends_on: dict[str, Any], resume: bool) -> None:
        self._file = RecordsFile(path, depends_on, resume)
        self.results = [_result(record, where) for where, record in self._file.found]

    def add(self, results: Iterable[Result]) -> None:
        """Keep results; those of a call are written together."""
        new = list(results)
        self._file.add(*(asdict(result) for result in new))
        self.results += new


def _result(record: dict[str, Any], where: str) -> Result:
    if {name: type(field) for name, field in record.items()} != _TYPES:
        raise InputError(f"{where}: not a result: {json.dumps(record)}")
    losses = tuple(record["losses"])
    finite = (isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    if not losses or not all(finite):
        raise InputError(f"{where}: losses must be finite numbers, not {losses}")
    return Result(**{**record, "losses": losses})
