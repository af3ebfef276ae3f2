"""The page of the results: Markdown from a file of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.benchmarks.cases import SUITES, Bar, load_suite, point_label
from tests.benchmarks.display import duration_text, significant
from tests.benchmarks.results import Results, Row, Spread, ratio

PICTURE = "figures/performance.png"

_HEAD = """\
# Performance

This page was written by `python -m tests.benchmarks page FILE.json`, from a run of
`python -m tests.benchmarks --profile {profile} --json FILE.json` on {date}:
{cores} cores of {processor}, {memory_gib} GiB, {system}; {versions}.

Each implementation runs in a process of its own, in an environment with pinned versions
(`python -m tests.benchmarks setup` makes them). The processes of a comparison take
turns in an order that changes each round; only one computes at a time, and all have the
same number of threads. A time is the median of the rounds. A speed is relative to the
series named first, taken within each round; more is better. After "±" is half the
distance of the quartiles. Memory is the rise of the peak during a step.

![Speed of the library and of its peers]({picture})
"""


def markdown(results: Results) -> str:
    """Return the page."""
    parts = [_head(results), *_bars(results)]
    for name in SUITES:
        rows = [row for row in results.rows if row.suite == name]
        if rows:
            parts += _section(name, rows)
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _head(results: Results) -> str:
    versions: dict[str, str] = {}
    for row in results.rows:
        versions |= row.facts.get("versions", {})
    text = ", ".join(f"{name} {found}" for name, found in sorted(versions.items()))
    return _HEAD.format(
        profile=results.profile,
        date=results.date[:10],
        versions=text or "no versions",
        picture=PICTURE,
        **results.machine,
    )


# The table of bars.


def _bars(results: Results) -> Iterator[str]:
    suites = {row.suite for row in results.rows}
    found = [
        (bar, bar_ratio(bar, name, results))
        for name in SUITES
        if name in suites
        for bar in load_suite(name).BARS
    ]
    if not found:
        return
    yield "## Goals\n"
    lines = ["| what | goal | measured | reached |", "|---|---|---|---|"]
    for bar, value in found:
        sign = "≤" if bar.at_most else "≥"
        goal = f"{sign} {bar.target:.2f}"
        measured, reached = "not measured", ""
        if value is not None:
            measured = _with_spread(value)
            reached = "yes" if reaches(bar, value) else "no"
        lines.append(f"| {' | '.join((bar.text, goal, measured, reached))} |")
    yield "\n".join(lines)
    if any(value is None for _, value in found):
        yield '"Not measured": this run had only a part of the groups (`--only`).'


def bar_ratio(bar: Bar, suite: str, results: Results) -> Spread | None:
    """Return the ratio of a bar, or None if it was not measured."""
    row = results.find(suite, bar.point, bar.series)
    other = results.find(suite, bar.point, bar.against)
    if bar.at_most:
        row, other = other, row
    return ratio(other, row, bar.figure)


def reaches(bar: Bar, value: Spread) -> bool:
    """Return whether a ratio reaches its bar."""
    return value.median <= bar.target if bar.at_most else value.median >= bar.target


# A section.


def _section(name: str, rows: list[Row]) -> Iterator[str]:
    suite = load_suite(name)
    yield f"## {suite.TITLE}\n"
    yield suite.ABOUT
    for rest, table in _tables(rows):
        heading = point_label(rest) or suite.TITLE
        column = list(table[0].point)[-1]
        yield f"### {heading}\n"
        yield _grid(table, column, "speed, time", _speed_cells(rows))
        yield from _figures(table, column)
        if any(row.peak_mib is not None for row in table):
            yield _grid(table, column, "rise of memory, MiB", _memory_cells)
        if any(row.facts.get("parameters") for row in table):
            yield _grid(table, column, "parameters", _parameter_cells)
        if any(row.facts.get("flops") for row in table):
            yield _grid(table, column, "GFLOP/s", _flops_cells)
    conclusions = getattr(suite, "conclusions", None)
    if conclusions is not None:
        yield from conclusions(rows)


def _tables(rows: list[Row]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Yield the rows whose points differ only in their last key."""
    tables: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        *rest, last = row.point
        shared = {name: row.point[name] for name in rest}
        key = f"{point_label(shared)} {last}"
        tables.setdefault(key, (shared, []))[1].append(row)
    yield from tables.values()


def _grid(rows: list[Row], column: str, corner: str, cell: Callable[[Row], str]) -> str:
    """Return a table with a line for each series and a column for each value."""
    values = list(dict.fromkeys(row.point[column] for row in rows))
    cells: dict[str, dict[Any, str]] = {}
    for row in sorted(rows, key=lambda row: row.series != row.baseline):
        cells.setdefault(row.series, {})[row.point[column]] = cell(row)
    headings = [f"{column} = {value}" for value in values]
    lines = [f"| {corner} | {' | '.join(headings)} |", "|---" * (1 + len(values)) + "|"]
    for series, found in cells.items():
        texts = [found.get(value, "") for value in values]
        if any(texts):
            lines.append(f"| {series} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _speed_cells(rows: list[Row]) -> Callable[[Row], str]:
    baselines = {
        point_label(row.point): row for row in rows if row.series == row.baseline
    }

    def cell(row: Row) -> str:
        if row.status != "measured":
            return row.status
        found = row.spread()
        if found is None:
            return ""
        time = duration_text(found).split(" (", maxsplit=1)[0]
        speed = ratio(baselines.get(point_label(row.point)), row)
        return f"{_with_spread(speed)}, {time}" if speed else time

    return cell


def _figures(rows: list[Row], column: str) -> Iterator[str]:
    """Yield a table for each figure other than the time."""
    names = dict.fromkeys(name for row in rows for name in row.rounds)
    for name in names:
        if name == "seconds":
            continue

        def cell(row: Row, name: str = name) -> str:
            found = row.spread(name)
            return "" if found is None else _plain(found)

        yield _grid(rows, column, name, cell)


def _memory_cells(row: Row) -> str:
    return "" if row.peak_mib is None else f"{row.peak_mib:,.0f}"


def _parameter_cells(row: Row) -> str:
    parameters = row.facts.get("parameters")
    return "" if parameters is None else f"{parameters:,}"


def _flops_cells(row: Row) -> str:
    flops, found = row.facts.get("flops"), row.spread()
    return f"{flops / found.median / 1e9:.0f}" if flops and found else ""


def _with_spread(found: Spread) -> str:
    return f"{found.median:.2f} ± {(found.high - found.low) / 2:.2f}"


def _plain(found: Spread) -> str:
    half = (found.high - found.low) / 2
    if found.median < 1:  # An AUC.
        return f"{found.median:.4f} ± {half:.4f}"
    return f"{significant(found.median)} ± {significant(half)}"


def lines_of(
    results: Results, suite: str, rest: Mapping[str, Any]
) -> dict[str, list[tuple[float, float]]]:
    """Return the points of a panel of the picture: (value, speed) by series.

    Args:
        results: the results.
        suite: name of the suite.
        rest: the point of its groups, without the last key.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        *keys, last = row.point
        if row.suite != suite or {key: row.point[key] for key in keys} != dict(rest):
            continue
        speed = ratio(results.find(suite, row.point, row.baseline), row)
        if speed is not None:
            found.setdefault(row.series, []).append((row.point[last], speed.median))
    return {series: sorted(points) for series, points in found.items()}
