"""What a case measures, in the process that measures it."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """What `make` of a case returns.

    Attributes:
        run: function that runs the given number of steps, and returns when they are
            done.
        parameters: number of trainable parameters.
        packages: the packages whose versions are reported.
        facts: what else to report: FLOPs of a step, sizes, deviations from the others.
        measure: in place of `run`, for figures other than the time of a step: called
            with the number of the round, it returns its figures by name. "seconds" is
            the one that is compared.
        kept: an object that must live as long as the workload.
    """

    run: Callable[[int], Any] | None = None
    parameters: int | None = None
    packages: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[int], dict[str, float]] | None = None
    kept: Any = None

    def round(self, steps: int, number: int) -> dict[str, float]:
        """Return the figures of a round."""
        if self.measure is not None:
            return self.measure(number)
        if self.run is None:
            raise ValueError("a workload needs run or measure")
        start = time.perf_counter()
        self.run(steps)
        return {"seconds": (time.perf_counter() - start) / steps}

    def describe(self) -> dict[str, Any]:
        """Return the parameters, versions and facts."""
        versions = {name: importlib.metadata.version(name) for name in self.packages}
        return {"parameters": self.parameters, "versions": versions, **self.facts}


def repeated(step: Callable[[], Any]) -> Callable[[int], None]:
    """Return `run` for a step that returns when it is done."""

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run
