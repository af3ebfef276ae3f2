"""How the time of a step grows with rows, experts, tasks, features, tables, history."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group
from tests.benchmarks.power_law import fit
from tests.benchmarks.results import Row

TITLE = "Growth"
ABOUT = """\
The time of a step as a power of one size, the others fixed: time ~ size^exponent, a
least-squares fit on logarithms of the medians, with its standard error. 0 means that
the size costs nothing, 1 that it costs in proportion. All sizes take turns in one
process.
"""
BARS: list[Bar] = []
SERIES = "keras_moe"

AXES = {
    "n": "rows of a batch: forward and backward pass of `MoE`, e = 8",
    "e": "experts: forward and backward pass of `MoE`, n = 8192",
    "t": "tasks: a step of `fit`, `MMoE` of 8 experts",
    "features": "columns of ids: a step of `fit`, `MMoE` of 8 experts",
    "history": "ids in the history of a row: a step of `fit`, `MMoE` of 8 experts",
    "rows": "rows of a table: a step of `fit`, `LazyAdam`, 20 columns of ids",
}
_SIZES = {
    "n": (1024, 2048, 4096, 8192, 16384),
    "e": (8, 16, 32, 64, 128, 256),
    "t": (1, 2, 4, 8, 16),
    "features": (8, 16, 32, 64, 128),
    "history": (8, 16, 32, 64, 128, 256),
    "rows": (10**4, 10**5, 10**6, 10**7),
}


def groups(profile: str) -> list[Group]:
    """Return a group for each axis."""
    if profile == "fast":
        return [_group("n", _SIZES["n"][:3])]
    return [_group(axis, sizes) for axis, sizes in _SIZES.items()]


def conclusions(rows: list[Row]) -> list[str]:
    """Return the table of the exponents."""
    lines = [
        "| size | exponent | standard error | from | to |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        costs = {}
        for figure in row.rounds:
            found = row.spread(figure)
            if found is not None:
                costs[float(figure.split(" = ")[1])] = found.median
        if len(costs) < 3:
            continue
        law, axis = fit(costs), row.point["axis"]
        lines.append(
            f"| {axis}, {AXES[axis]} | {law.exponent:.2f} | {law.standard_error:.2f} | "
            f"{min(costs):,.0f} | {max(costs):,.0f} |"
        )
    return ["\n".join(lines)]


def _group(axis: str, sizes: tuple[int, ...]) -> Group:
    arguments = {"axis": axis, "sizes": sizes}
    module = "tests.benchmarks.ours.growth"
    case = Case(SERIES, "own", module, arguments, ours=True)
    return Group("growth", {"axis": axis}, (case,), baseline=SERIES, max_gib=8.0)
