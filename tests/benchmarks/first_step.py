"""The first training step of a new process, and what comes before it.

Each round starts `python -m tests.benchmarks.first_step MODULE ARGUMENTS` in the same
environment.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

from tests.benchmarks.workload import Workload


def make(module: str, arguments: dict[str, Any]) -> Workload:
    """Return the measurement.

    Args:
        module: the module of a case.
        arguments: of its `make`.
    """

    def measure(_: int) -> dict[str, float]:
        given = [module, json.dumps(arguments), repr(time.time())]
        command = [sys.executable, "-m", "tests.benchmarks.first_step", *given]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = [x for x in done.stdout.splitlines() if x.startswith('{"seconds"')]
        return json.loads(lines[-1])

    return Workload(measure=measure)


def main() -> None:
    """Take the first step, and print what took how long."""
    module, arguments, started = sys.argv[1:]
    times = [float(started), time.time()]
    imported = importlib.import_module(module)
    times.append(time.time())
    workload = imported.make(**json.loads(arguments))
    times.append(time.time())
    workload.run(1)
    times.append(time.time())
    parts = ("interpreter", "import", "build", "step")
    seconds = (after - before for before, after in pairwise(times))
    figures = {f"{part}, s": x for part, x in zip(parts, seconds, strict=True)}
    print(json.dumps({"seconds": times[-1] - times[0], **figures}))


if __name__ == "__main__":
    main()
