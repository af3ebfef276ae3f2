"""Tests of the paper's four claims on the final losses.

Runs with the same number use the same data for every model and, except for p, for every
correlation: all differences are paired by run. The 95% interval of a difference is a
percentile bootstrap over runs with 10,000 resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from recsys_examples.task_correlation.settings import BOTTOM, MMOE, OMOE, PLE

# Maps model and correlation to the final losses, one per run.
Losses = Mapping[str, Mapping[float, np.ndarray]]

MIXTURES = (OMOE, MMOE)  # the paper's; PLE is of 2020 and not part of the claims
MARGIN = 0.1  # of OMoE's mean loss: losses that differ by less are about equal
MIN_RUNS = 5  # required for a meaningful bootstrap interval
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: the claim.
        rule: the criterion by which it is tested.
        holds: whether the criterion is met; None if results are missing.
        evidence: the figures, one line each.
    """

    text: str
    rule: str
    holds: bool | None
    evidence: tuple[str, ...]


def check_claims(losses: Losses) -> list[Claim]:
    """Test the four claims.

    Args:
        losses: maps model and correlation to the final losses, in the order of the
            runs. Claims about missing models or correlations, or with fewer than 5
            runs, are not checked.
    """
    return [
        _mixtures_are_better(losses),
        _mixtures_vary_less(losses),
        _equal_for_identical_tasks(losses),
        _lead_grows(losses),
    ]


def mean(losses: np.ndarray) -> np.ndarray:
    """Return the mean over runs, the last axis."""
    return np.mean(losses, axis=-1)


def standard_deviation(losses: np.ndarray) -> np.ndarray:
    """Return the standard deviation over runs, the last axis."""
    return np.std(losses, axis=-1, ddof=1)


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Interval:
    """Return `statistic(*samples)` with its bootstrap interval over runs.

    Args:
        statistic: function of samples of shape `(..., r)`, over r runs, to `(...)`.
        *samples: losses of the same r runs, each of shape `(r,)`.
    """
    runs = len(samples[0])
    drawn = np.random.default_rng(0).integers(runs, size=(_RESAMPLES, runs))
    resampled = statistic(*(sample[drawn] for sample in samples))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(statistic(*samples)), float(low), float(high))


def difference(statistic: Callable, first: np.ndarray, second: np.ndarray) -> Interval:
    """Return `statistic(first) - statistic(second)` with its interval."""
    return bootstrap(lambda a, b: statistic(a) - statistic(b), first, second)


def _mixtures_are_better(losses: Losses) -> Claim:
    return _compared_with_bottom(
        losses,
        mean,
        "mixtures beat the shared bottom at every p",
        "mean loss of the shared bottom minus that of OMoE, of MMoE: interval above 0",
    )


def _mixtures_vary_less(losses: Losses) -> Claim:
    return _compared_with_bottom(
        losses,
        standard_deviation,
        "mixtures vary less over runs than the shared bottom at every p",
        "the same differences of standard deviations over runs: interval above 0",
    )


def _compared_with_bottom(
    losses: Losses, statistic: Callable, text: str, rule: str
) -> Claim:
    shared = _correlations(losses, BOTTOM, *MIXTURES)
    evidence, holds = [], []
    for p in shared:
        for model in (*MIXTURES, *([PLE] if p in _correlations(losses, PLE) else [])):
            gain = difference(statistic, losses[BOTTOM][p], losses[model][p])
            evidence.append(f"p = {p:g}, {model}: {gain}")
            if model in MIXTURES:
                holds.append(gain.low > 0)
    return Claim(text, rule, all(holds) if holds else None, tuple(evidence))


def _equal_for_identical_tasks(losses: Losses) -> Claim:
    text = "MMoE is about equal to OMoE at p = 1"
    rule = (
        "mean loss of OMoE minus that of MMoE: interval within "
        f"{MARGIN:.0%} of OMoE's mean"
    )
    if 1.0 not in _correlations(losses, OMOE, MMOE):
        return Claim(text, rule, None, ())
    lead = difference(mean, losses[OMOE][1.0], losses[MMOE][1.0])
    margin = MARGIN * float(mean(losses[OMOE][1.0]))
    holds = -margin < lead.low and lead.high < margin
    return Claim(text, rule, holds, (f"p = 1: {lead}, margin {margin:.4f}",))


def _lead_grows(losses: Losses) -> Claim:
    text = "MMoE's lead over OMoE grows as p falls"
    rule = (
        "mean loss of OMoE minus that of MMoE: larger at each lower p, and "
        "its value at the lowest p minus that at the highest: interval above 0"
    )
    falling = sorted(_correlations(losses, OMOE, MMOE), reverse=True)
    if len(falling) < 2:
        return Claim(text, rule, None, ())
    leads = [difference(mean, losses[OMOE][p], losses[MMOE][p]) for p in falling]
    highest, lowest = falling[0], falling[-1]
    growth = difference(
        mean,
        losses[OMOE][lowest] - losses[MMOE][lowest],
        losses[OMOE][highest] - losses[MMOE][highest],
    )
    values = [lead.value for lead in leads]
    holds = growth.low > 0 and values == sorted(set(values))
    evidence = [f"p = {p:g}: {lead}" for p, lead in zip(falling, leads, strict=True)]
    evidence.append(f"p = {lowest:g} minus p = {highest:g}: {growth}")
    return Claim(text, rule, holds, tuple(evidence))


def _correlations(losses: Losses, *models: str) -> list[float]:
    """Return the correlations at which all models have `MIN_RUNS` runs."""
    return sorted(
        p
        for p in losses.get(models[0], {})
        if all(len(losses.get(m, {}).get(p, ())) >= MIN_RUNS for m in models)
    )
