"""Any argument: public constructors and calls with right values and wrong kinds.

    python -m tests.robustness.arguments --constructors 20000 --calls 5000 --json FILE
    python -m tests.robustness.arguments --only layers.MoE --seed 3

What fails is printed at once, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from rich.console import Console
from rich.progress import Progress

from tests.robustness import calls, constructors, results

BATCH = 20
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
    kind: str,
    count: int,
    seed: int,
    report: Callable[[str], None],
    advance: Callable[[int], None] = lambda cases: None,
    batch: int = BATCH,
) -> Tally:
    """Run at least `count` cases over all subjects, in turn."""
    tally = Tally()
    known = subjects(kind)
    while tally.cases < count:
        for name, (cases, judge, text) in known.items():
            if tally.cases >= count:
                break
            before = tally.cases
            for case, outcome, wrong in run_batch(cases, judge, seed, batch):
                tally.outcomes[outcome or "wrong"] += 1
                if wrong is not None:
                    tally.wrong.append(f"{text(case)}: {wrong}")
                    report(
                        f"{text(case)}\n    {wrong}\n    --only {name} --seed {seed}"
                    )
            advance(tally.cases - before)
        seed += 1
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constructors", type=int, default=20_000, metavar="N")
    parser.add_argument("--calls", type=int, default=5_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="one batch of one subject")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    if arguments.only:
        return _repeat(arguments.only, arguments.seed, console)
    tallies = {}
    with Progress(console=console) as progress:
        for kind in ("constructors", "calls"):
            count = getattr(arguments, kind)
            task = progress.add_task(kind, total=count)
            tallies[kind] = run(
                kind,
                count,
                arguments.seed,
                lambda text: progress.console.print(
                    text, markup=False, highlight=False
                ),
                lambda cases, task=task: progress.advance(task, cases),
            )
    lines = [tally.line(kind) for kind, tally in tallies.items() if tally.cases]
    for line in lines:
        console.print(f"{line.what}: {line.survived} of {line.cases}. {line.note}")
    if arguments.json:
        command = (
            "python -m tests.robustness.arguments "
            f"--constructors {arguments.constructors} --calls {arguments.calls}"
        )
        results.write(arguments.json, "arguments", command, lines)
    return int(any(tally.wrong for tally in tallies.values()))


def _repeat(name: str, seed: int, console: Console) -> int:
    for kind in ("constructors", "calls"):
        if name not in subjects(kind):
            continue
        cases, judge, text = subjects(kind)[name]
        any_wrong = False
        for case, outcome, wrong in run_batch(cases, judge, seed, BATCH):
            any_wrong |= wrong is not None
            console.print(text(case), "->", outcome or f"WRONG: {wrong}", markup=False)
        return int(any_wrong)
    console.print(
        f"--only must be one of {[*subjects('constructors'), *subjects('calls')]}"
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
