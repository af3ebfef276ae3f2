"""Steps of several sizes, which take turns in one process."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tests.benchmarks import power_law
from tests.benchmarks.ours import shared_model, sparse_layers, tables
from tests.benchmarks.workload import Workload

SECONDS = 0.1  # A round of a size has as many steps as take about this time.


def make(axis: str, sizes: Sequence[int]) -> Workload:
    """Return the exponent of the time of a step, and the time at both ends.

    Args:
        axis: a key of `growth.AXES`.
        sizes: the sizes.
    """
    workloads = {size: _workload(axis, size) for size in sizes}
    steps = {}
    for size, workload in workloads.items():
        workload.round(1, 0)  # Compiles.
        seconds = workload.round(1, 0)["seconds"]
        steps[size] = math.ceil(SECONDS / max(seconds, 1e-3))

    def measure(number: int) -> dict[str, float]:
        order = list(workloads)
        random.Random(number).shuffle(order)
        times = {i: workloads[i].round(steps[i], number)["seconds"] for i in order}
        law = power_law.fit(times)
        return {
            "exponent": law.exponent,
            "standard error of the exponent": law.standard_error,
            "ms at the smallest size": 1e3 * times[min(times)],
            "ms at the largest size": 1e3 * times[max(times)],
        }

    return Workload(measure=measure, packages=("keras", "tensorflow"))


def _workload(axis: str, size: int) -> Workload:
    if axis in ("n", "e"):
        sizes = {"rows": 8192, "experts": 8}
        sizes["rows" if axis == "n" else "experts"] = size
        return sparse_layers.make("MLP", sizes)
    if axis == "rows":
        return tables.make("LazyAdam", size)
    return shared_model.make(**{"tasks" if axis == "t" else axis: size})
