"""Steps of several sizes, which take turns in one process."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tests.benchmarks.ours import shared_model, sparse_layers, tables
from tests.benchmarks.workload import Workload

SECONDS = 0.1  # A round of a size has as many steps as take about this time.


def make(axis: str, sizes: Sequence[int]) -> Workload:
    """Return the time of a step by size.

    Args:
        axis: a key of `growth.AXES`.
        sizes: the sizes.
    """
    workloads = {f"{axis} = {size}": _workload(axis, size) for size in sizes}
    steps = {}
    for name, workload in workloads.items():
        workload.round(1, 0)  # Compiles.
        seconds = workload.round(1, 0)["seconds"]
        steps[name] = math.ceil(SECONDS / max(seconds, 1e-3))

    def measure(number: int) -> dict[str, float]:
        order = list(workloads)
        random.Random(number).shuffle(order)
        found = {n: workloads[n].round(steps[n], number)["seconds"] for n in order}
        return {name: found[name] for name in workloads}

    return Workload(measure=measure, packages=("keras", "tensorflow"))


def _workload(axis: str, size: int) -> Workload:
    if axis in ("n", "e"):
        sizes = {"rows": 8192, "experts": 8}
        sizes["rows" if axis == "n" else "experts"] = size
        return sparse_layers.make("MLP", sizes)
    if axis == "rows":
        return tables.make("LazyAdam", size)
    return shared_model.make(**{"tasks" if axis == "t" else axis: size})
