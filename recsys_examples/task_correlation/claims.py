"""The paper's four claims, decided from the final losses by rules stated here.

Runs of one number have the same data in every model and, but for p, at every
correlation, so all differences are taken within runs. How sure a difference is, a
bootstrap says: the runs are drawn again with replacement, 10,000 times, and its
interval holds the middle 95% of what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from recsys_examples.task_correlation.settings import BOTTOM, MMOE, OMOE, PLE

# By model and correlation, the final loss of each run.
Losses = Mapping[str, Mapping[float, np.ndarray]]

MIXTURES = (OMOE, MMOE)  # of the paper; PLE is of 2020 and decides no claim
MARGIN = 0.1  # Two mean losses closer than this share of OMoE's are about equal.
FEWEST_RUNS = 5  # below, an interval of the bootstrap says nothing
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: what is claimed.
        rule: what would make it true.
        holds: whether it is; None if the results it is about are not there.
        evidence: the figures, a line each.
    """

    text: str
    rule: str
    holds: bool | None
    evidence: tuple[str, ...]


def check_claims(losses: Losses) -> list[Claim]:
    """Decide the four claims.

    Args:
        losses: by model and correlation, the final loss of each run, in the order of
            the runs. Models and correlations may be missing; the claims about them
            are then not checked, nor are any with less than 5 runs.
    """
    return [
        _mixtures_are_better(losses),
        _mixtures_spread_less(losses),
        _equal_for_identical_tasks(losses),
        _lead_grows(losses),
    ]


def mean(losses: np.ndarray) -> np.ndarray:
    """Return the mean over runs, the last axis."""
    return np.mean(losses, axis=-1)


def spread(losses: np.ndarray) -> np.ndarray:
    """Return the standard deviation over runs, the last axis."""
    return np.std(losses, axis=-1, ddof=1)


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Interval:
    """Return `statistic(*samples)`, and its interval when the runs are drawn again.

    Args:
        statistic: maps samples of shape `(..., r)` over r runs to `(...)`.
        *samples: the losses of the same r runs, each `(r,)`.
    """
    runs = len(samples[0])
    drawn = np.random.default_rng(0).integers(runs, size=(_RESAMPLES, runs))
    resampled = statistic(*(sample[drawn] for sample in samples))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(statistic(*samples)), float(low), float(high))


def difference(statistic: Callable, first: np.ndarray, second: np.ndarray) -> Interval:
    """Return how much larger a statistic is for the first losses than the second."""
    return bootstrap(lambda a, b: statistic(a) - statistic(b), first, second)


def _mixtures_are_better(losses: Losses) -> Claim:
    return _against_the_bottom(
        losses,
        mean,
        "mixtures beat the shared bottom at every p",
        "mean loss of the shared bottom less that of OMoE, of MMoE: interval above 0",
    )


def _mixtures_spread_less(losses: Losses) -> Claim:
    return _against_the_bottom(
        losses,
        spread,
        "mixtures spread less than the shared bottom at every p",
        "standard deviation over runs, the same differences: interval above 0",
    )


def _against_the_bottom(
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
        "mean loss of OMoE less that of MMoE: interval within "
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
        "mean loss of OMoE less that of MMoE: larger at each lower p, and the "
        "lowest p less the highest: interval above 0"
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
    evidence.append(f"p = {lowest:g} less p = {highest:g}: {growth}")
    return Claim(text, rule, holds, tuple(evidence))


def _correlations(losses: Losses, *models: str) -> list[float]:
    """Return the correlations at which all these models have enough runs."""
    return sorted(
        p
        for p in losses.get(models[0], {})
        if all(len(losses.get(m, {}).get(p, ())) >= FEWEST_RUNS for m in models)
    )
