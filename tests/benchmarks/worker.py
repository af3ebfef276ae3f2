"""The process of one case: JSON lines, requests on stdin and replies on stdout.

    python -m tests.benchmarks.worker        in the environment of the case

{"make": {"module": ..., "arguments": {...}}}   {"steps": whether rounds have steps}
{"round": steps, "number": i}                   figures of the round: {"seconds": ...}
{"memory": true}                                {"peak_mib": ..., "resident_mib": ...}
{"describe": true}                              parameters, versions and facts

A failed request is answered with {"error": text}, and with {"absent": text} if a
package is not installed. What libraries print goes to stderr.
The process ends when its stdin is closed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.workload import Workload


def main() -> None:
    """Answer requests until stdin is closed."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # Whatever else is printed must not be taken for a reply.
        handler = Handler()
        for line in sys.stdin:
            try:
                reply = handler(json.loads(line))
            except ModuleNotFoundError as error:
                reply = {"absent": str(error)}
            except Exception as error:
                import traceback

                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), file=replies, flush=True)


class Handler:
    """Answers requests about one workload."""

    def __init__(self) -> None:
        self._workload: Workload | None = None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if "make" in request:
            module = importlib.import_module(request["make"]["module"])
            self._workload = module.make(**request["make"]["arguments"])
            return {"steps": self._workload.measure is None}
        workload = self._workload
        if workload is None:
            raise ValueError("the first request must be make")
        if "round" in request:
            return workload.round(request["round"], request["number"])
        if "memory" in request:
            return _memory(workload)
        if "describe" in request:
            return workload.describe()
        raise ValueError(f"unknown request: {request}")


def _memory(workload: Workload) -> dict[str, float | None]:
    """Return by how many MiB one step raises the peak of the memory in use.

    TensorFlow with oneDNN keeps freed memory in a pool, so that the peak of the process
    does not rise: there it is the peak of the pool's blocks in use.
    """
    if workload.run is None or not _STATUS.exists():
        return {"peak_mib": None, "resident_mib": None}
    try:
        # Return freed memory to the system; otherwise it would be reused unnoticed.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # The peak is now the present.
    except (OSError, AttributeError):
        return {"peak_mib": None, "resident_mib": None}
    before = _resident("VmRSS")
    _pool_rise(reset=True)
    workload.run(1)
    rise = max(_resident("VmHWM") - before, _pool_rise())
    return {"peak_mib": rise, "resident_mib": before}


_STATUS = Path("/proc/self/status")


def _resident(field: str) -> float:
    lines = _STATUS.read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def _pool_rise(reset: bool = False) -> float:
    """Return the peak of TensorFlow's pool above its present use, in MiB."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None:
        return 0.0
    memory = tensorflow.config.experimental
    try:
        if reset:
            memory.reset_memory_stats("CPU:0")
        used = memory.get_memory_info("CPU:0")
    except ValueError:  # Without a pool.
        return 0.0
    return (used["peak"] - used["current"]) / 2**20


if __name__ == "__main__":
    main()
