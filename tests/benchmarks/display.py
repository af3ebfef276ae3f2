"""Figures as text, and the table that the command prints for a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.benchmarks.cases import point_label
from tests.benchmarks.results import Row, Spread, ratio

if TYPE_CHECKING:
    from rich.table import Table


def group_table(rows: list[Row]) -> Table:
    """Return the results of a group."""
    from rich.table import Table

    first = rows[0]
    count = max(len(values) for row in rows for values in [_seconds(row)])
    title = f"{first.suite}: {point_label(first.point)} (median of {count}, quartiles)"
    table = Table(title=title, title_justify="left")
    table.add_column("series")
    headings = ["time", f"speed, {first.baseline} = 1", "rise of memory", "parameters"]
    for heading in headings:
        table.add_column(heading, justify="right")
    baseline = next(row for row in rows if row.series == row.baseline)
    for row in rows:
        if row.status != "measured":
            table.add_row(row.series, row.status, row.reason)
            continue
        parameters = row.facts.get("parameters")
        table.add_row(
            row.series,
            *([duration_text(row.spread())] if _seconds(row) else [""]),
            ratio_text(ratio(baseline, row)),
            mib_text(row.peak_mib),
            "" if parameters is None else f"{parameters:,}",
        )
        for figure in row.rounds:
            if figure != "seconds":
                table.add_row(f"  {figure}", figure_text(row.spread(figure)))
    return table


def _seconds(row: Row) -> list[float]:
    return row.rounds.get("seconds", [])


def duration_text(found: Spread | None) -> str:
    """Return seconds as text with a unit: "12.3 ms (12.1 to 12.9)"."""
    if found is None:
        return ""
    scale, unit = (1.0, "s") if found.median >= 10 else (1e3, "ms")
    if found.median < 1e-3:
        scale, unit = 1e6, "µs"
    median, low, high = (significant(scale * value) for value in found)
    return f"{median} {unit} ({low} to {high})"


def ratio_text(found: Spread | None) -> str:
    """Return a ratio as text: "1.25 (1.21 to 1.30)"."""
    if found is None:
        return ""
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def figure_text(found: Spread | None) -> str:
    """Return any figure as text, with four significant digits."""
    if found is None:
        return ""
    return f"{found.median:.4g} ({found.low:.4g} to {found.high:.4g})"


def mib_text(mib: float | None) -> str:
    """Return memory as text."""
    return "" if mib is None else f"{mib:,.0f} MiB"


def significant(value: float) -> str:
    """Return a number with three significant digits, without exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
