"""The results: a row for each case of each group, and the file that holds them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.environments import available_cores

FORMAT = 1


class Spread(NamedTuple):
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float


@dataclass
class Row:
    """What was found for a case.

    Attributes:
        suite, point: the group.
        series, environment, ours: the case.
        baseline: the series to which the speed is relative.
        status: "measured", "absent", "too large" or "failed".
        reason: why it was not measured.
        rounds: values of each round by figure. Values of the same place in different
            rows of a group were measured one after the other.
        peak_mib: rise of the peak memory during a step.
        resident_mib: memory before the step.
        facts: parameters, versions and others.
    """

    suite: str
    point: Mapping[str, Any]
    series: str
    environment: str
    baseline: str
    ours: bool = False
    status: str = "measured"
    reason: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: float | None = None
    resident_mib: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def spread(self, figure: str = "seconds") -> Spread | None:
        """Return the median and the quartiles of a figure, or None."""
        return spread(self.rounds.get(figure, []))


@dataclass
class Results:
    """A run of the benchmarks.

    Attributes:
        profile: a key of `cases.PROFILES`.
        machine: processor, cores, memory, system.
        date: when the run started.
        rows: the rows.
    """

    profile: str
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    date: str = field(default_factory=lambda: _now())
    rows: list[Row] = field(default_factory=list)

    def find(self, suite: str, point: Mapping[str, Any], series: str) -> Row | None:
        """Return the row of a case, or None."""
        for row in self.rows:
            if (row.suite, dict(row.point), row.series) == (suite, dict(point), series):
                return row
        return None


def spread(values: Iterable[float]) -> Spread | None:
    """Return the median and the quartiles of values; None if there are none."""
    values = list(values)
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(
    above: Row | None, below: Row | None, figure: str = "seconds"
) -> Spread | None:
    """Return the ratio of two rows of a group, taken in each round.

    For seconds it is the speed of `below` relative to `above`.
    """
    if above is None or below is None:
        return None
    pairs = zip(
        above.rounds.get(figure, []), below.rounds.get(figure, []), strict=False
    )
    return spread(x / y for x, y in pairs if y)


def write(results: Results, path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps({"format": FORMAT, **asdict(results)}, indent=1)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def read(path: Path) -> Results:
    """Read a JSON file.

    Raises:
        ValueError: if the file cannot be read or has another format.
    """
    try:
        found = json.loads(path.read_text())
        if found.pop("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        rows = [Row(**row) for row in found.pop("rows")]
        return Results(rows=rows, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of results: {error}") from error


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "processor": _processor(),
        "cores": len(available_cores()),
        "memory_gib": round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        ),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor()
