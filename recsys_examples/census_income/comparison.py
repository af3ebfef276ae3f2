"""Is one model better than another over the same seeds?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

GAIN = 0.001  # the AUC that a layer should add
LEVEL = 0.05  # of the t-test
FEWEST_FOR_RANKS = (
    6  # pairs: with fewer, Wilcoxon's p is above `LEVEL` whatever they are
)


@dataclass(frozen=True)
class Comparison:
    """Differences of paired runs.

    Attributes:
        mean: of the differences.
        deviation: their standard deviation.
        better: share of the pairs in which the first is ahead.
        t_test: two-sided p of the paired t-test.
        wilcoxon: two-sided p of the Wilcoxon signed-rank test.
    """

    mean: float
    deviation: float
    better: float
    t_test: float
    wilcoxon: float

    @property
    def holds(self) -> bool:
        """Whether the first is ahead by `GAIN`, and not by chance."""
        return self.mean >= GAIN and self.t_test < LEVEL


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare values of the same seeds.

    Raises:
        ValueError: if there are not the same two or more on both sides.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            "a paired test needs the same two or more seeds on both sides; got "
            f"{len(first)} and {len(second)}"
        )
    differences = np.subtract(first, second)
    if np.ptp(differences) == 0:
        # No spread: the tests are not defined, and nothing speaks against chance
        # but a difference itself.
        certain = 0.0 if differences[0] else 1.0
        return Comparison(
            float(differences[0]), 0.0, float(differences[0] > 0), certain, certain
        )
    return Comparison(
        mean=float(differences.mean()),
        deviation=float(differences.std(ddof=1)),
        better=float((differences > 0).mean()),
        t_test=float(stats.ttest_1samp(differences, 0.0).pvalue),
        wilcoxon=float(stats.wilcoxon(differences).pvalue),
    )
