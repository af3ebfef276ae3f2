"""Training that is killed again and again ends as one that was not.

`python -m tests.robustness.resume --kills 20 --json FILE` trains with a backup after
every batch. The process is ended by SIGKILL at random moments, those of writes
included, and started again, until the training ends: its hash of all variables, and its
history, must be those of a training that was never killed. It does so on TensorFlow, on
JAX, and in two processes of JAX.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.progress import Progress

from keras_moe import _files
from tests.robustness.results import Tried, write
from tests.support import processes

EPOCHS = 30
CASES = (
    ("tensorflow", "tf", 1, "TensorFlow, a shuffled `tf.data` pipeline"),
    ("tensorflow", "py_dataset", 1, "TensorFlow, a `PyDataset` with random batches"),
    ("jax", "tf", 1, "JAX, a shuffled `tf.data` pipeline"),
    ("jax", "fixed_order", 2, "two processes of JAX, which share a pipeline"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    draws, tried = random.Random(given.seed), []
    with Progress() as progress:
        for backend, data, count, what in CASES:
            bar = progress.add_task(what, total=given.kills)
            with tempfile.TemporaryDirectory() as folder:
                tried.append(
                    _kill(
                        Path(folder),
                        Run(backend, data, count),
                        given.kills,
                        draws,
                        what,
                        lambda bar=bar: progress.advance(bar),
                    )
                )
            command = f"python -m tests.robustness.resume --kills {given.kills}"
            write(given.json, "exact resume", command, tried)
    for line in tried:
        print(f"{line.survived} of {line.cases}: {line.what}. {line.note}")


class Run:
    """One training, in one process or several."""

    def __init__(self, backend: str, data: str, count: int) -> None:
        self._backend, self._data, self._count = backend, data, count

    def __call__(self, folder: Path, kill: float | None = None) -> dict | None:
        """Return what the training finds, or None if it was killed."""
        command = [sys.executable, "-m", "tests.support.interrupted", str(folder)]
        command += ["--data", self._data, "--epochs", str(EPOCHS), "--every-steps", "1"]
        if self._count > 1:
            command += ["--processes", str(self._count)]
            command += ["--address", processes.free_address()]
        started = [
            subprocess.Popen(
                [
                    *command,
                    *(["--process", str(i)] if self._count > 1 else []),
                    # One is killed, as on a machine that fails; see below.
                    *(["--kill", f"{kill:.3f}"] if kill is not None and i == 0 else []),
                ],
                env={
                    **os.environ,
                    "KERAS_BACKEND": self._backend,
                    "JAX_PLATFORMS": "cpu",
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(self._count)
        ]
        first = started[0]
        out, err = first.communicate(timeout=600)
        for other in started[1:]:
            if first.returncode:  # It waits for the one that is gone.
                other.kill()
            other.communicate(timeout=600)
        if first.returncode == -signal.SIGKILL:
            return None
        if first.returncode:
            raise SystemExit(err[-3000:])
        return json.loads(out.splitlines()[-1])


def _kill(folder, run, kills, draws, what, advance) -> Tried:
    expected = run(folder / "whole")
    killed = writing = trainings = 0
    equal = True
    while killed < kills:
        trainings += 1
        backups = folder / f"backups-{trainings}"
        found = None
        while found is None:
            delay = draws.uniform(0.0, 0.4) if killed < kills else None
            found = run(backups, delay)
            if found is None:
                killed += 1
                advance()
                partial = backups.glob(f"{_files.PREFIX}*")
                writing += any(any(hidden.iterdir()) for hidden in partial)
        equal = equal and found == expected
    return Tried(
        what=what,
        cases=killed,
        survived=killed if equal else 0,
        outcome="bit-identical weights, optimizer, generators and history at the end",
        note=f"{trainings} trainings; {writing} of the kills came during a write",
    )


if __name__ == "__main__":
    main()
