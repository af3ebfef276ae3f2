"""Training that is killed again and again ends as one that was not.

`python -m tests.robustness.resume --kills 20 --json FILE` trains with a backup after
every batch. The process is ended by SIGKILL at random moments of compilation, training
and writes, and started again, until the training ends: its hash of all variables, and
its history, must be those of a training that was never killed. It does so on
TensorFlow, JAX and torch, and in two processes of JAX, of which either is killed.
Ended itself and run again with the same FILE, it goes on after the last kill: until all
is done, what it knows is beside FILE.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import Progress

from keras_moe import _files
from tests.robustness import results
from tests.support import processes

EPOCHS = 12
OUTCOME = "bit-identical weights, optimizer, generators and history at the end"
# A kill comes up to so many seconds after `fit` begins, which first compiles; after the
# first batch that is trained; or after a write begins. And what share of the kills.
MOMENTS = {"start": (4.0, 0.25), "batch": (0.4, 0.4), "write": (0.03, 0.35)}
TIMEOUT = 1800
# Backend, data, number of processes and share of the kills.
CASES = {
    "TensorFlow, a shuffled `tf.data` pipeline": ("tensorflow", "tf", 1, 0.5),
    "TensorFlow, a `PyDataset` with random batches": (
        *("tensorflow", "py_dataset"),
        *(1, 0.5),
    ),
    "JAX, a shuffled `tf.data` pipeline": ("jax", "tf", 1, 1.0),
    "two processes of JAX, which share a pipeline": ("jax", "fixed_order", 2, 0.5),
    "torch, arrays that Keras shuffles": ("torch", "arrays", 1, 0.5),
}


def main() -> int:
    """Run the profile; return 1 if a training ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="on JAX, and on TensorFlow; half as many on torch and in two processes",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="trainings that have this text")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    command = f"python -m tests.robustness.resume --kills {given.kills}"
    tried = _done(given.json, command)
    work = given.json.with_name(f"{given.json.name}.unfinished")
    with Progress() as progress:
        for what, (backend, data, count, share) in CASES.items():
            if given.only not in what or what in (line.what for line in tried):
                continue
            kills = round(given.kills * share)
            bar = progress.add_task(what, total=kills)
            folder = work / str(list(CASES).index(what))
            killed = Killed(folder, Run(backend, data, count), f"{given.seed} {what}")
            line = killed.until(
                kills, what, lambda done, bar=bar: progress.update(bar, completed=done)
            )
            tried.append(line)
            results.write(given.json, "exact resume", command, tried)
            shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # others are not done
        work.rmdir()
    for line in tried:
        print(f"{line.survived} of {line.cases}: {line.what}. {line.note}")
    return int(any(line.survived < line.cases for line in tried))


def _done(path: Path, command: str) -> list[results.Tried]:
    if not path.exists():
        return []
    _, of_file, tried = results.read(path)
    return tried if of_file == command else []


@dataclass(frozen=True)
class Kill:
    """A SIGKILL for one process, so many seconds after the start of what it does."""

    process: int
    seconds: float
    since: str


class Run:
    """One training, in one process or several."""

    def __init__(self, backend: str, data: str, count: int) -> None:
        self._backend, self._data, self.count = backend, data, count

    def __call__(self, folder: Path, kill: Kill | None = None) -> dict:
        """Return what the training finds, or what it was "killed" in."""
        command = [sys.executable, "-m", "tests.support.interrupted", str(folder)]
        command += ["--data", self._data, "--epochs", str(EPOCHS), "--every-steps", "1"]
        if self.count > 1:
            command += ["--processes", str(self.count)]
            command += ["--address", processes.free_address()]
        started = [self._start(command, i, kill) for i in range(self.count)]
        first = started[0 if kill is None else kill.process]
        out, err = first.communicate(timeout=TIMEOUT)
        for other in started:
            if first.returncode and other is not first:
                other.kill()  # It waits for the one that is gone.
            if other is not first:
                other.communicate(timeout=TIMEOUT)
        if first.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(err[-3000:])
        return json.loads(out.splitlines()[-1])

    def _start(self, command: list[str], i: int, kill: Kill | None) -> subprocess.Popen:
        if self.count > 1:
            command = [*command, "--process", str(i)]
        if kill is not None and i == kill.process:
            command = [*command, "--kill", f"{kill.seconds:.3f}", "--since", kill.since]
        environment = {
            **os.environ,
            "KERAS_BACKEND": self._backend,
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@dataclass
class State:
    """What is known after each kill.

    Attributes:
        expected: what the training that is not killed finds.
        cases: kills.
        judged: those of trainings that have ended.
        right: those of trainings that ended as they must.
        trainings: how many were begun.
        moments: how many kills came when.
        seconds: duration of all.
    """

    expected: dict | None = None
    cases: int = 0
    judged: int = 0
    right: int = 0
    trainings: int = 1
    moments: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("writing", "training", "compiling"), 0)
    )
    seconds: float = 0.0


class Killed:
    """A training that is killed again and again, and then another one."""

    def __init__(self, folder: Path, run: Run, seed: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._run, self._seed = folder, run, seed
        self._path = folder / "state.json"
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._state = State(**known)

    def until(
        self, kills: int, what: str, report: Callable[[int], None]
    ) -> results.Tried:
        """Return the line of so many kills."""
        state = self._state
        if state.expected is None:
            state.expected = self._timed(self._folder / "whole", None)
        while state.judged < kills:
            report(state.cases)
            backups = self._folder / f"backups-{state.trainings}"
            before = _partial(backups)
            found = self._timed(backups, self._kill() if state.cases < kills else None)
            if "killed" in found:
                # The disk is the witness: a write that ends so leaves a hidden folder.
                is_write = bool(_partial(backups) - before)
                state.moments["writing" if is_write else found["killed"]] += 1
                state.cases += 1
            else:
                state.right += (found == state.expected) * (state.cases - state.judged)
                state.judged = state.cases
                state.trainings += state.cases < kills
            with _files.atomic_write(self._path, overwrite=True) as unfinished:
                unfinished.write_text(json.dumps(asdict(state)))
        note = (
            f"of the kills, {state.moments['writing']} came during a write, "
            f"{state.moments['training']} between two writes, "
            f"{state.moments['compiling']} before the first batch that was trained; "
            f"trainings: {state.trainings}, minutes: {state.seconds / 60:.0f}"
        )
        return results.Tried(what, state.cases, state.right, OUTCOME, note)

    def _timed(self, backups: Path, kill: Kill | None) -> dict:
        start = time.monotonic()
        found = self._run(backups, kill)
        self._state.seconds += time.monotonic() - start
        return found

    def _kill(self) -> Kill:
        # Also of the trainings: a kill that came after the end is drawn anew.
        draws = random.Random(
            f"{self._seed} {self._state.cases} {self._state.trainings}"
        )
        since, (seconds, _) = draws.choices(
            [*MOMENTS.items()], [share for _, share in MOMENTS.values()]
        )[0]
        process = draws.randrange(self._run.count)
        return Kill(process, draws.uniform(0, seconds), since)


def _partial(backups: Path) -> set[str]:
    return {path.name for path in backups.glob(f"{_files.PREFIX}*")}


if __name__ == "__main__":
    sys.exit(main())
