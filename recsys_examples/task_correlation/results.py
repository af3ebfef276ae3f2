"""The results of a study in a file: a line each, so that a stopped study can go on.

The first line says what the results depend on, every other one is a result in JSON. A
line counts when it ends: one that was cut off in writing is dropped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys_examples.errors import InputError
from recsys_examples.runs import make_folder

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
        InputError: if there are results and `resume` is False, if there are none and
            it is True, or if they were made with something else than `depends_on` or
            cannot be read.
    """

    def __init__(self, path: Path, depends_on: dict[str, Any], resume: bool) -> None:
        self._path = path
        self.results: list[Result] = []
        if resume:
            self._read(depends_on)
            return
        make_folder(path.parent)
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise InputError(
                f"{path} holds the results of a study: add --resume to go on with it, "
                "or choose another folder with --out"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        self._append(depends_on)

    def add(self, results: Iterable[Result]) -> None:
        """Keep results; those of a call are written together."""
        new = list(results)
        self._append(*(asdict(result) for result in new))
        self.results += new

    def _append(self, *values: dict[str, Any]) -> None:
        text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
        try:
            with self._path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror}") from error

    def _read(self, depends_on: dict[str, Any]) -> None:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{self._path}: no study to go on with: {error.strerror}"
            ) from error
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if not lines:
            raise InputError(f"{self._path}: no study to go on with: no line is whole")
        self._check_same(_parsed(lines[0], f"{self._path}, line 1"), depends_on)
        for number, line in enumerate(lines[1:], start=2):
            self.results.append(_result(line, f"{self._path}, line {number}"))
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))

    def _check_same(self, found: dict[str, Any], depends_on: dict[str, Any]) -> None:
        now = json.loads(json.dumps(depends_on))
        for name in sorted(found.keys() | now.keys()):
            if found.get(name) != now.get(name):
                raise InputError(
                    f"{self._path}: these results were made with {name} = "
                    f"{found.get(name)}, this study has {now.get(name)}"
                )


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


def _result(line: bytes, where: str) -> Result:
    value = _parsed(line, where)
    found = {name: type(field) for name, field in value.items()}
    if found != _TYPES:
        raise InputError(f"{where}: not a result: {line.decode(errors='replace')}")
    losses = tuple(value["losses"])
    finite = (isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    if not losses or not all(finite):
        raise InputError(f"{where}: losses must be finite numbers, not {losses}")
    return Result(**{**value, "losses": losses})
