"""Damaged files, full disks and killed processes: the long profile.

python -m tests.robustness.files --cases 500 --json files.json
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich.progress import Progress

from tests.robustness import (
    backup_cases,
    damage,
    read_cases,
    unchecked_cases,
    write_cases,
)
from tests.robustness.read_cases import Case
from tests.robustness.results import Tried, write

Cases = Callable[[Path, random.Random], Iterator[Case]]
_SHOWN = 3  # failed cases in a note
_NAMED = "one error that names the file"


@dataclass(frozen=True)
class Group:
    """Cases of one kind.

    Attributes:
        what: as in `Tried`.
        outcome: as in `Tried`.
        cases: function from a folder and a generator to cases without end.
        share: share of all cases, of those that must be right.
        note: as in `Tried`.
    """

    what: str
    outcome: str
    cases: Cases
    share: float
    note: str = ""


GROUPS = (
    Group(
        "`keras_moe.export.load` of a damaged SavedModel",
        "ValueError that names the path, or the same outputs",
        read_cases.saved_models,
        0.24,
    ),
    Group(
        "`recommend --model` with a damaged run",
        f"status 2 and {_NAMED}, or the same list",
        read_cases.recommend,
        0.12,
    ),
    Group(
        "data folders: three formats each of MovieLens and Census-Income, Ali-CCP, "
        "KuaiRand, AliExpress",
        f"{_NAMED}, or rows that are valid",
        read_cases.data_folders,
        0.24,
        "A value that is changed to another valid one cannot be noticed.",
    ),
    Group(
        "results of studies and runs",
        f"{_NAMED}, or the same values",
        read_cases.results,
        0.12,
    ),
    Group(
        "backups of `ExactBackup`: one of two, or the only one, is damaged or of "
        "another version",
        f"bit-identical from the backup before, or {_NAMED}",
        backup_cases.backups,
        0.08,
    ),
    Group(
        "each write of a run, a study and an export, with room for a part",
        f"what was there is whole, nothing is left, {_NAMED}",
        write_cases.full_disk,
        0.16,
    ),
    Group(
        "the same on a small or read-only disk",
        f"what was there is whole, nothing is left, {_NAMED}",
        write_cases.small_disk,
        0.06,
    ),
    Group(
        "eight runs that begin at once",
        "eight whole folders",
        write_cases.runs_at_once,
        0.02,
    ),
    Group(
        "SIGKILL at a random moment, beside a living run",
        "the next run removes what the dead left, and nothing of the living",
        write_cases.killed_runs,
        0.04,
    ),
)
# Beyond the cases that must be right: formats that have no checksums.
UNCHECKED = {"onnx": "ONNX", "litert": "LiteRT", "openvino": "OpenVINO"}


def run(cases: int, seed: int, groups: tuple[Group, ...] = GROUPS) -> list[Tried]:
    """Run the cases of the groups; return a line for each."""
    tried = []
    with _progress() as bar, tempfile.TemporaryDirectory() as folder:
        # Read by a user without rights too.
        scratch = Path(folder).resolve()
        scratch.chmod(0o755)
        for group in groups:
            count = round(cases * group.share)
            if group.cases is write_cases.small_disk and not write_cases.can_mount(
                scratch
            ):
                continue
            tried.append(_run_group(group, count, seed, scratch, bar))
    return tried


def run_unchecked(cases: int, seed: int) -> list[Tried]:
    """Flip bits of formats without checksums; return a line for each."""
    tried = []
    with ExitStack() as stack:
        bar = stack.enter_context(_progress())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtimes = unchecked_cases.Runtimes()
        stack.callback(runtimes.close)
        for format, name in UNCHECKED.items():
            group = Group(
                f"a flipped bit in a file of {name}, which has no checksums",
                "an error of the runtime, or the same outputs",
                partial(unchecked_cases.flipped_bits, format=format, runtimes=runtimes),
                1.0,
            )
            tried.append(_run_group(group, cases, seed, scratch, bar))
    return tried


def _run_group(
    group: Group, count: int, seed: int, scratch: Path, bar: Progress
) -> Tried:
    task = bar.add_task(group.what[:60], total=count)
    # Texts have the same seed in every process, unlike their hashes.
    rng = random.Random(f"{seed} {group.what}")
    folder = scratch / f"group-{len(list(scratch.iterdir()))}"
    folder.mkdir()
    faults = []
    before = len(damage.judged)
    for case in islice(group.cases(folder, rng), count):
        fault = case()
        if fault is not None:
            faults.append(fault)
            if not bar.console.is_terminal:
                print(f"{group.what}: {fault}", file=sys.stderr, flush=True)
        bar.advance(task)
    errors = len(damage.judged) - before
    counted = f"{errors} gave an error." if errors else ""
    notes = [group.note, counted, *(f"Not so: {fault}." for fault in faults[:_SHOWN])]
    note = " ".join(note for note in notes if note).replace(str(scratch), "...")
    return Tried(group.what, count, count - len(faults), group.outcome, note)


def _progress() -> Progress:
    from rich.console import Console

    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)


def main(arguments: list[str] | None = None) -> int:
    """Run the profile; return 1 if a case that must be right was not."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.files")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument(
        "--unchecked", type=int, default=100, help="of each format without checksums"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="groups whose description has this text")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    groups = tuple(g for g in GROUPS if not given.only or given.only in g.what)
    tried = run(given.cases, given.seed, groups)
    checked = len(tried)
    if given.unchecked and not given.only:
        tried += run_unchecked(given.unchecked, given.seed)
    for line in tried:
        print(f"{line.survived} of {line.cases}: {line.what}. {line.note}")
    if given.json:
        command = f"python -m tests.robustness.files --cases {given.cases}"
        if given.only:
            command += f" --only '{given.only}'"
        elif given.unchecked:
            command += f" --unchecked {given.unchecked}"
        # A part has a section of its own, and leaves that of all as it is.
        profile = f"files: {given.only}" if given.only else "files"
        write(given.json, profile, command, tried)
    return int(any(line.survived < line.cases for line in tried[:checked]))


if __name__ == "__main__":
    sys.exit(main())
