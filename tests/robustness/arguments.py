"""Any argument: public constructors and calls with right values and wrong kinds.

    python -m tests.robustness.arguments --constructors 20000 --calls 5000 --json FILE
    python -m tests.robustness.arguments --only layers.MoE --seed 3

What fails is printed at once, with the command that repeats it. An interrupted run
writes the cases that it has done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from rich.console import Console
from rich.progress import Progress

from tests.robustness import calls, constructors, results

PART = 1000  # Cases after which a process says what came of them.
OUTCOME = {
    "constructors": "an error that names the argument, or an object that works, is "
    "saved, loaded in safe mode, and then gives the same numbers",
    "calls": "an error that names the argument, or the right numbers",
}


@dataclass
class Tally:
    """What came of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.outcomes.total()

    def line(self, kind: str) -> results.Tried:
        refused, works = self.outcomes["refused"], self.outcomes["works"]
        note = f"{refused} refused, {works} accepted"
        if self.wrong:
            note += f"; wrong, for example: {self.wrong[0]}"
        what = f"{kind} with any arguments"
        return results.Tried(what, self.cases, refused + works, OUTCOME[kind], note)


def run_batch(
    cases: Any, judge: Callable[[Any], str], seed: int, size: int
) -> Iterator[tuple[Any, str | None, str | None]]:
    """Yield each case of a batch with its outcome, or with what is wrong."""
    found: list[tuple[Any, str | None, str | None]] = []

    @seeded(seed)
    @settings(
        max_examples=size,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        try:
            found.append((case, judge(case), None))
        except constructors.WrongError as error:
            found.append((case, None, str(error)))

    run()
    yield from found


def subjects(
    kind: str,
) -> dict[str, tuple[Any, Callable[[Any], str], Callable[..., str]]]:
    """The cases of each subject, the judge of one, and its text."""
    if kind == "calls":
        return {
            name: (
                calls.changes(name),
                lambda case, name=name: calls.judge(name, case),
                lambda case, name=name: calls.text_of(name, case),
            )
            for name in calls.subjects()
        }
    return {
        name: (
            constructors.changes(made),
            lambda case, made=made: constructors.judge(made, case),
            lambda case, made=made: constructors.text_of(made, case),
        )
        for name, made in constructors.constructors().items()
    }


def run(
    kind: str, count: int, seed: int, report: Callable[[str], None], batch: int = 0
) -> Tally:
    """Run at least `count` cases over all subjects, in turn."""
    tally = Tally()
    known = subjects(kind)
    batch = batch or max(2, count // len(known))
    while tally.cases < count:
        for name, (cases, judge, text) in known.items():
            if tally.cases >= count:
                break
            for case, outcome, wrong in run_batch(cases, judge, seed, batch):
                tally.outcomes[outcome or "wrong"] += 1
                if wrong is not None:
                    tally.wrong.append(f"{text(case)}: {wrong}")
                    again = f"--only {name} --seed {seed} --batch {batch}"
                    report(f"{text(case)}\n    {wrong}\n    {again}")
        seed += 1
    return tally


def _part(kind: str, count: int, seed: int) -> Tally:
    """Run in a process of its own."""
    return run(kind, count, seed, lambda text: print(text, flush=True))


def _run_all(counts: dict[str, int], seed: int, jobs: int) -> dict[str, Tally]:
    """Run all cases, in parts of their own seeds."""
    tallies = {kind: Tally() for kind in counts}
    spawn = multiprocessing.get_context("spawn")
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(jobs, spawn) as pool,
        Progress(console=console) as progress,
    ):
        waiting = {}
        for kind, count in counts.items():
            task = progress.add_task(kind, total=count)
            for i, start in enumerate(range(0, count, PART)):
                size = min(PART, count - start)
                part = pool.submit(_part, kind, size, seed + 1000 * i)
                waiting[part] = kind, task

        def count(part: Future[Tally]) -> None:
            kind, task = waiting.pop(part)
            found = part.result()
            tallies[kind].outcomes += found.outcomes
            tallies[kind].wrong += found.wrong
            progress.advance(task, found.cases)

        try:
            for part in as_completed([*waiting]):
                count(part)
        except KeyboardInterrupt:
            console.print("interrupted: the parts that have begun are the last")
            pool.shutdown(cancel_futures=True)
            for part in [part for part in waiting if not part.cancelled()]:
                count(part)
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constructors", type=int, default=20_000, metavar="N")
    parser.add_argument("--calls", type=int, default=5_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--only", metavar="NAME", help="one batch of one subject")
    parser.add_argument("--batch", type=int, default=20, metavar="N", help="its cases")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    if given.only:
        return _repeat(given.only, given.seed, given.batch, console)
    counts = {"calls": given.calls, "constructors": given.constructors}
    tallies = _run_all(counts, given.seed, given.jobs)
    lines = [tally.line(kind) for kind, tally in tallies.items() if tally.cases]
    for line in lines:
        console.print(f"{line.what}: {line.survived} of {line.cases}. {line.note}")
    if given.json:
        command = (
            "python -m tests.robustness.arguments "
            f"--constructors {given.constructors} --calls {given.calls}"
        )
        results.write(given.json, "arguments", command, lines)
    return int(any(tally.wrong for tally in tallies.values()))


def _repeat(name: str, seed: int, batch: int, console: Console) -> int:
    for kind in ("constructors", "calls"):
        if name not in subjects(kind):
            continue
        cases, judge, text = subjects(kind)[name]
        any_wrong = False
        for case, outcome, wrong in run_batch(cases, judge, seed, batch):
            any_wrong |= wrong is not None
            console.print(text(case), "->", outcome or f"WRONG: {wrong}", markup=False)
        return int(any_wrong)
    known = [*subjects("constructors"), *subjects("calls")]
    console.print(f"--only must be one of {known}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
