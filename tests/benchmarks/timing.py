"""Measures a group: its workers compute one at a time, in rounds of changing order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from tests.benchmarks.cases import Case, Group, Profile
from tests.benchmarks.environments import available_cores
from tests.benchmarks.remote import CaseError, Remote
from tests.benchmarks.results import Row

_MAKE_SECONDS = 300.0  # Imports, weights, compilation.
_ROUND_SECONDS = 1800.0  # Training to the end, in suites that compare accuracy.
_MAX_STEPS = 1000


def measure(
    group: Group, profile: Profile, announce: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Return a row for each case of a group.

    Args:
        group: the group.
        profile: number and length of the rounds.
        announce: called with what is being done.
    """
    rows = {case.series: _row(group, case) for case in group.cases}
    remotes: dict[str, Remote] = {}
    steps: dict[str, int] = {}

    def attempt(series: str, work: Callable[[], Any]) -> None:
        """Do a part of the work of a case; a case that fails is left out from then."""
        try:
            work()
        except CaseError as error:
            row = rows[series]
            row.status, row.reason, row.rounds = error.status, error.reason, {}
            if series in remotes:
                remotes.pop(series).kill()

    try:
        for case in group.cases:
            name = case.series
            announce(f"{group.label}: starting {name}")
            attempt(name, lambda c=case: _prepare(c, group, profile, remotes, steps))
            if name in remotes:
                attempt(name, lambda n=name: _describe(remotes[n], rows[n]))
        rounds = group.rounds or profile.rounds
        for number in range(rounds):
            announce(f"{group.label}: round {number + 1} of {rounds}")
            order = list(remotes)
            random.Random(number).shuffle(order)
            for name in order:
                attempt(
                    name,
                    lambda n=name, i=number: _round(remotes[n], rows[n], steps[n], i),
                )
    finally:
        for remote in remotes.values():
            remote.close()
    return list(rows.values())


def _row(group: Group, case: Case) -> Row:
    return Row(
        suite=group.suite,
        point=dict(group.point),
        series=case.series,
        environment=case.environment,
        baseline=group.baseline,
        ours=case.ours,
    )


def _prepare(
    case: Case,
    group: Group,
    profile: Profile,
    remotes: dict[str, Remote],
    steps: dict[str, int],
) -> None:
    """Start a worker, let it compile, and find how many steps its rounds have."""
    threads = group.threads or len(available_cores())
    remote = remotes[case.series] = Remote(case, threads, group.max_gib)
    made = {"module": case.module, "arguments": dict(case.arguments)}
    steps[case.series] = group.steps or 1
    if not remote.ask(_MAKE_SECONDS, make=made)["steps"]:
        return
    remote.ask(_MAKE_SECONDS, round=1, number=-2)
    seconds = remote.ask(_MAKE_SECONDS, round=1, number=-1)["seconds"]
    if seconds > group.max_seconds:
        raise CaseError("too large", f"a step takes {seconds:.0f} s")
    if not group.steps:
        count = math.ceil(profile.seconds / max(seconds, 1e-6))
        steps[case.series] = min(count, _MAX_STEPS)


def _describe(remote: Remote, row: Row) -> None:
    memory = remote.ask(_MAKE_SECONDS, memory=True)
    row.peak_mib, row.resident_mib = memory["peak_mib"], memory["resident_mib"]
    row.facts = remote.ask(_MAKE_SECONDS, describe=True)


def _round(remote: Remote, row: Row, steps: int, number: int) -> None:
    figures = remote.ask(_ROUND_SECONDS, round=steps, number=number)
    for figure, value in figures.items():
        row.rounds.setdefault(figure, []).append(value)
