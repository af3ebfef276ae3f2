"""The side of the measuring process: starts the worker of a case and asks it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import Case
from tests.benchmarks.environments import ROOT, available_cores, python_of

_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 10
_THREAD_VARIABLES = (
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)


class CaseError(Exception):
    """A case that cannot be measured.

    Args:
        status: "absent", "too large" or "failed".
        reason: why, in a line.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Remote:
    """The worker of a case.

    Args:
        case: the case.
        threads: number of threads, and of cores that the process may use.
        max_gib: memory of the process at which it is ended.

    Raises:
        CaseError: if the environment of the case was not made.
    """

    def __init__(self, case: Case, threads: int, max_gib: float) -> None:
        if case.missing:
            raise CaseError("absent", case.missing)
        python = python_of(case.environment)
        if python is None:
            raise CaseError(
                "absent",
                f"environment {case.environment!r} is not made; run python -m "
                f"tests.benchmarks setup {case.environment}",
            )
        self._max_gib = max_gib
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-m", "tests.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=_variables(case, threads),
        )
        if hasattr(os, "sched_setaffinity"):
            cores = available_cores()[:threads]
            os.sched_setaffinity(self._process.pid, cores)

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """Return the reply to a request.

        Args:
            seconds: how long to wait for it.
            **request: the request.

        Raises:
            CaseError: if the worker reports an error or a package that is absent, ends,
                does not reply in time, or takes too much memory.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        deadline = time.monotonic() + seconds
        while not select.select([self._process.stdout], [], [], _POLL_SECONDS)[0]:
            if time.monotonic() > deadline:
                raise CaseError("too large", f"no reply within {seconds:g} s")
            if self._gib() > self._max_gib:
                raise CaseError("too large", f"more than {self._max_gib:g} GiB")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply = json.loads(line)
        if "absent" in reply:
            raise CaseError("absent", reply["absent"])
        if "error" in reply:
            raise CaseError("failed", reply["error"])
        return reply

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(_CLOSE_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()
        self.close()

    def _gib(self) -> float:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30

    def _ended(self) -> CaseError:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        reason = lines[-1] if lines else f"status {self._process.poll()}"
        return CaseError("failed", f"the worker ended: {reason}")


def _variables(case: Case, threads: int) -> dict[str, str]:
    counts = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TQDM_DISABLE": "1"}
    inherited = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        **quiet,
        **counts,
        **case.variables,
    }
