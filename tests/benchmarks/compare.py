"""Two files of results: where this library fell behind what it was compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.benchmarks.cases import point_label
from tests.benchmarks.results import Results, Row, Spread, ratio

LEAST_FALL = 0.05
LEAST_FALL_OF_ACCURACY = 0.002


@dataclass(frozen=True)
class Fall:
    """A ratio that fell, or a case that is no longer measured.

    Attributes:
        what: group, series and figure, in a line.
        before, after: the ratio to `against`; None if it is no longer measured.
        against: the series to which the ratio is taken.
        reason: why it is no longer measured.
    """

    what: str
    before: Spread
    after: Spread | None
    against: str = ""
    reason: str = ""


def falls(old: Results, new: Results) -> Iterator[Fall]:
    """Yield the falls from one file to another.

    For each figure of each case of this library, its ratio to every series of the group
    that is not of this library, and to the baseline, is compared. A fall is one by more
    than 5 % (0.2 % for an AUC), and by more than the distances of the quartiles of both
    files together. Cases that only one file has are left out.
    """
    for before in old.rows:
        after = new.find(before.suite, before.point, before.series)
        if not before.ours or before.status != "measured" or after is None:
            continue
        what = f"{before.suite}: {point_label(before.point)}: {before.series}"
        if after.status != "measured":
            measured = before.spread() or Spread(0, 0, 0)
            reason = f"{after.status}: {after.reason}"
            yield Fall(what, measured, None, reason=reason)
            continue
        for other in _references(old, before):
            reference = new.find(other.suite, other.point, other.series)
            if reference is None:
                continue
            for figure in before.rounds:
                first = _gain(figure, other, before)
                second = _gain(figure, reference, after)
                if first and second and _fell(figure, first, second):
                    yield Fall(f"{what}, {figure}", first, second, other.series)


def count(old: Results, new: Results) -> int:
    """Return the number of cases of this library that both files have."""
    return sum(
        new.find(row.suite, row.point, row.series) is not None
        for row in old.rows
        if row.ours and row.status == "measured"
    )


def _references(results: Results, row: Row) -> list[Row]:
    group = (row.suite, dict(row.point))
    return [
        other
        for other in results.rows
        if (other.suite, dict(other.point)) == group
        and other.series != row.series
        and (not other.ours or other.series == row.baseline)
    ]


def _gain(figure: str, reference: Row, row: Row) -> Spread | None:
    """Return a ratio that is larger where the row is better."""
    if more_is_better(figure):
        return ratio(row, reference, figure)
    return ratio(reference, row, figure)


def more_is_better(figure: str) -> bool:
    """Return whether a figure measures accuracy; all others measure cost."""
    return figure.startswith("AUC")


def _fell(figure: str, before: Spread, after: Spread) -> bool:
    fall = before.median - after.median
    noise = (before.high - before.low) + (after.high - after.low)
    least = LEAST_FALL_OF_ACCURACY if more_is_better(figure) else LEAST_FALL
    return fall > noise and fall > least * before.median
