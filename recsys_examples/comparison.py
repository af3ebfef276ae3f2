"""Paired significance tests of two models over the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

GAIN = 0.001  # smallest gain in AUC that counts
LEVEL = 0.05  # significance level of the t-test
# With fewer pairs, the p of the Wilcoxon test cannot be below `LEVEL`.
MIN_WILCOXON_PAIRS = 6


@dataclass(frozen=True)
class Comparison:
    """Paired differences, first model minus second.

    Attributes:
        mean: mean of the differences.
        deviation: standard deviation of the differences.
        better: fraction of the pairs in which the first model is better.
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
        """Whether the first model is better by `GAIN`, with p < `LEVEL`."""
        return self.mean >= GAIN and self.t_test < LEVEL


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare the values of two models, in the same order of seeds.

    Raises:
        ValueError: if the lengths differ or are below 2.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            "a paired test needs two or more seeds, the same for both models; got "
            f"{len(first)} and {len(second)} values"
        )
    differences = np.subtract(first, second)
    if np.ptp(differences) == 0:
        # Without variance the tests are undefined: p is 0 for any difference, else 1.
        p = 0.0 if differences[0] else 1.0
        return Comparison(float(differences[0]), 0.0, float(differences[0] > 0), p, p)
    return Comparison(
        mean=float(differences.mean()),
        deviation=float(differences.std(ddof=1)),
        better=float((differences > 0).mean()),
        t_test=float(stats.ttest_1samp(differences, 0.0).pvalue),
        wilcoxon=float(stats.wilcoxon(differences).pvalue),
    )
