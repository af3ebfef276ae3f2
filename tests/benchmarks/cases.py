"""What is measured: cases, which alternate in groups, which suites list.

A suite is a module of this package, named in `SUITES`, with

    TITLE: str                       heading of its section on the page
    ABOUT: str                       Markdown below the heading: what, which sizes
    BARS: list[Bar]                  the required results (may be empty)
    groups(profile) -> list[Group]   what to measure; profile is a key of `PROFILES`
    conclusions(rows) -> list[str]   optional: Markdown paragraphs below the tables
    PANELS: list[dict]               optional: the panels of the picture, each the point
                                     of its groups without the last key

The page has a table for all groups whose points differ only in their last key, which
names its columns: {"model": "MMoE", "e": 8} is a column of the table of MMoE.

Modules of suites import nothing heavy: the libraries are imported in the workers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

SUITES = (
    "mixtures",
    "serving",
    "census",
    "moe_layers",
    "sparse_mmoe",
    "optimizers",
    "whole_step",
    "growth",
)


@dataclass(frozen=True)
class Profile:
    """How long to measure.

    Attributes:
        rounds: number of rounds in which the cases of a group alternate.
        seconds: a round of a case has as many steps as take about this time.
    """

    rounds: int
    seconds: float


PROFILES = {
    "fast": Profile(rounds=3, seconds=0.1),
    "regular": Profile(rounds=7, seconds=0.3),
    "large": Profile(rounds=15, seconds=1.0),
}


@dataclass(frozen=True)
class Case:
    """One implementation, measured in a process of its own.

    Attributes:
        series: its name in tables, the same in all groups of a suite.
        environment: a key of `environments.ENVIRONMENTS`.
        module: a module with a function `make`, which returns a `workload.Workload`.
        arguments: the arguments of `make`, as JSON can hold them.
        variables: environment variables of the process, such as KERAS_BACKEND.
        ours: whether this library is measured, not a peer or a limit. `compare` looks
            at these cases.
        missing: what the case lacks, if it cannot be run: it is reported as absent.
    """

    series: str
    environment: str
    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Group:
    """Cases that do the same work, measured in alternation.

    Attributes:
        suite: name of the suite.
        point: what distinguishes the group from the others of the suite, {"e": 8}.
        cases: the cases; their series differ.
        baseline: the series to which the speed of the others is relative.
        threads: number of threads of each process; None: all cores.
        rounds: in place of the number of the profile.
        steps: steps of a round, in place of the number that takes the profile's time.
        max_gib: a process with more memory is ended: "too large".
        max_seconds: a case with longer steps is left out: "too large".
    """

    suite: str
    point: Mapping[str, Any]
    cases: tuple[Case, ...]
    baseline: str
    threads: int | None = None
    rounds: int | None = None
    steps: int | None = None
    max_gib: float = 6.0
    max_seconds: float = 20.0

    def __post_init__(self) -> None:
        names = [case.series for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"series of a group must differ; got {names}")
        if self.baseline not in names:
            raise ValueError(f"baseline must be one of {names}; got {self.baseline!r}")

    @property
    def label(self) -> str:
        """The suite and the point, for a line of text."""
        return f"{self.suite}: {point_label(self.point)}"


@dataclass(frozen=True)
class Bar:
    """A required result.

    Attributes:
        text: what is compared, for the table of bars.
        target: the least ratio, or the greatest if `at_most`.
        point: the group.
        series: the series that must reach the target.
        against: the ratio is the figure of this series by that of `series`: for
            seconds, how many times as fast `series` is. If `at_most`, it is the
            figure of `series` by that of this one.
        figure: the figure of a round; "seconds" is the time of a step.
        at_most: whether a smaller ratio is better.
    """

    text: str
    target: float
    point: Mapping[str, Any]
    series: str
    against: str
    figure: str = "seconds"
    at_most: bool = False


def point_label(point: Mapping[str, Any]) -> str:
    """Return a point as text, "model = MMoE, e = 8"."""
    return ", ".join(f"{name} = {value}" for name, value in point.items())


def load_suite(name: str) -> ModuleType:
    """Return the module of a suite.

    Raises:
        ValueError: if there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")
    return importlib.import_module(f"tests.benchmarks.{name}")


def select(only: list[str], profile: str) -> list[Group]:
    """Return the groups to measure.

    Args:
        only: names of suites, each with or without `:TEXT`, which keeps the groups
            whose point contains the text ("mixtures:e = 8"); empty: all groups.
        profile: a key of `PROFILES`.

    Raises:
        ValueError: if there is no such suite, or a choice has no group.
    """
    found = []
    for choice in only or SUITES:
        name, _, text = choice.partition(":")
        groups = load_suite(name).groups(profile)
        chosen = [group for group in groups if text in point_label(group.point)]
        if only and not chosen:
            raise ValueError(f"{choice!r} has no group in the profile {profile!r}")
        found += chosen
    return found
