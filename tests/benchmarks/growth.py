"""How the time of a step grows with rows, experts, tasks, features, history, tables."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "Growth"
AXES = {
    "n": "rows of a batch; forward and backward pass of `MoE`, e = 8",
    "e": "experts; forward and backward pass of `MoE`, 8192 rows",
    "t": "tasks; step of `fit`, `MMoE` of 8 experts, with towers",
    "features": "columns of ids; step of `fit`, `MMoE` of 8 experts",
    "history": "ids in the history of a row; step of `fit`, `MMoE` of 8 experts",
    "rows": "rows of a table; step of `fit`, `LazyAdam`, 20 columns of ids",
}
SIZES = {
    "n": (1024, 2048, 4096, 8192, 16384),
    "e": (8, 16, 32, 64, 128, 256),
    "t": (1, 2, 4, 8, 16),
    "features": (8, 16, 32, 64, 128),
    "history": (8, 16, 32, 64, 128, 256),
    "rows": (10**4, 10**5, 10**6, 10**7),
}
_FAST = {"n": SIZES["n"][:3]}

_LINES = "\n".join(
    f"- {axis}, from {SIZES[axis][0]:,} to {SIZES[axis][-1]:,}: {text}"
    for axis, text in AXES.items()
)
ABOUT = f"""\
The time of a step as a power of one size, the others fixed: time ~ size^exponent, by
least squares on logarithms. 0 means that the size costs nothing, 1 that it costs in
proportion. The sizes take turns in one process, and each round has its fit.

{_LINES}
"""
BARS: list[Bar] = []
SERIES = "keras_moe"


def groups(profile: str) -> list[Group]:
    """Return a group for each size that grows."""
    chosen = _FAST if profile == "fast" else SIZES
    return [_group(axis, sizes) for axis, sizes in chosen.items()]


def _group(axis: str, sizes: tuple[int, ...]) -> Group:
    arguments = {"axis": axis, "sizes": sizes}
    module = "tests.benchmarks.ours.growth"
    case = Case(SERIES, "own", module, arguments, ours=True)
    return Group("growth", {"size": axis}, (case,), baseline=SERIES, max_gib=8.0)
