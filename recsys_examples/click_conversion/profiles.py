"""The sources and budgets of the study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from recsys_examples.click_conversion.models import Shape
from recsys_examples.click_conversion.settings import Budget
from recsys_examples.click_conversion.simulator import Impressions
from recsys_examples.click_conversion.sources import (
    Files,
    RandHie,
    SimulatedChain,
    Source,
)
from recsys_examples.click_conversion.streamed import LOGS

SIMULATOR, RAND_HIE = "simulator", "rand_hie"
DATA = (SIMULATOR, RAND_HIE, *LOGS)

# A factorised logistic regression, as in many production systems: it cannot represent
# the conversion rate, so that the rows that it is trained on decide what it learns.
LINEAR = Shape(8, (), "linear")
# Large enough for the conversion rate.
FLEXIBLE = Shape(32, (8,))
IMPRESSIONS = Impressions()
SHIFT = 2.0
RAND_HIE_BOTTOM = Shape(32, (8,))
FILES_BOTTOM = Shape(64, (16,))


@dataclass(frozen=True)
class Profile:
    """The size of a study.

    Attributes:
        budget: of each model.
        rows: impressions of the simulator.
    """

    budget: Budget
    rows: int


PROFILES = {
    "tiny": Profile(Budget((0.01,), (1, 2), 1, 2), 3000),
    "default": Profile(Budget(), 50_000),
    "full": Profile(Budget((0.001, 0.003, 0.01, 0.03), (2, 5, 15, 30), 3, 30), 200_000),
}


def simulated(rows: int) -> list[Source]:
    """Return impressions with and without a shift, for models of two sizes."""
    settings = replace(IMPRESSIONS, rows=rows, users=rows // 10)
    shifted = replace(settings, covariate_shift=SHIFT)
    return [
        SimulatedChain("selection_bias", shifted, LINEAR),
        SimulatedChain("no_bias", settings, LINEAR),
        SimulatedChain("selection_bias_large_model", shifted, FLEXIBLE),
    ]


def sources(
    data: list[str],
    rows: int,
    folder: Path | None,
    max_rows: int | None,
    max_buckets: int,
) -> list[Source]:
    """Return the sources of the chosen data.

    Args:
        data: names of `DATA`.
        rows: impressions of the simulator.
        folder: the folder of a public log.
        max_rows: rows of each part of a log to read at most; None for all.
        max_buckets: largest vocabulary size of a category of a log.
    """
    found: list[Source] = []
    for name in data:
        if name == SIMULATOR:
            found += simulated(rows)
        elif name == RAND_HIE:
            found.append(RandHie("rand_hie_chain", True, RAND_HIE_BOTTOM))
            found.append(RandHie("rand_hie_amounts", False, RAND_HIE_BOTTOM))
        else:
            assert folder is not None, "the command line checks it"
            found.append(Files(name, folder, FILES_BOTTOM, max_rows, max_buckets))
    return found
