"""The picture of the page: speeds relative to the baseline, one panel a comparison."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from tests.benchmarks.cases import SUITES, load_suite, point_label
from tests.benchmarks.page import lines_of
from tests.benchmarks.results import Results

_COLUMNS = 2


def png(results: Results) -> bytes:
    """Return the picture of the panels that the suites name in `PANELS`."""
    from matplotlib.figure import Figure

    panels = [
        (name, rest, lines)
        for name in SUITES
        for rest in getattr(load_suite(name), "PANELS", [])
        if (lines := lines_of(results, name, rest))
    ]
    rows = max(1, -(-len(panels) // _COLUMNS))
    figure = Figure(figsize=(5 * _COLUMNS, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, rest, lines) in zip(axes, panels, strict=False):
        _draw(axis, results, name, rest, lines)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _draw(axis: Any, results: Results, name: str, rest: dict, lines: dict) -> None:
    rows = [row for row in results.rows if row.suite == name]
    ours = {row.series for row in rows if row.ours}
    first = next(row for row in rows if rest.items() <= row.point.items())
    for series, points in lines.items():
        x, y = zip(*points, strict=True)
        width = 2.5 if series in ours else 1.2
        style = "--" if series == first.baseline else "-"
        axis.plot(x, y, style, marker="o", markersize=4, linewidth=width, label=series)
    values = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    speeds = [y for points in lines.values() for _, y in points]
    if max(speeds) > 10 * min(speeds):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(list(first.point)[-1])
    axis.set_ylabel(f"speed, {first.baseline} = 1")
    axis.set_title(textwrap.fill(point_label(rest), 48), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
