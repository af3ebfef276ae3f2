"""`MMoE` whose gates choose a few experts, beside dense gates."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "Sparse gates of MMoE"
ABOUT = """\
A forward and backward pass of `MMoE` with two tasks, 8192 rows, e experts of
256 -> 512 -> 256: with dense gates, and with gates that choose the best 2 or the best
expert of each task.
"""
BARS: list[Bar] = []
DENSE = "dense gates"


def groups(profile: str) -> list[Group]:
    """Return a group for each compiler and e; none in the fast profile."""
    experts = {"fast": (), "regular": (8, 32), "large": (4, 8, 16, 32, 64)}[profile]
    return [_group(c, e) for c in ("graph", "XLA") for e in experts]


def _group(compiler: str, experts: int) -> Group:
    cases = [
        Case(
            series,
            "own",
            "tests.benchmarks.ours.sparse_mmoe",
            {"experts": experts, "top_k": top_k, "compiler": compiler},
            ours=True,
        )
        for series, top_k in {DENSE: None, "top 2": 2, "top 1": 1}.items()
    ]
    point = {"compiler": compiler, "e": experts}
    return Group("sparse_mmoe", point, tuple(cases), baseline=DENSE)
