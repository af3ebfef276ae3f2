"""A step of `fit` with its optimizer: a model with `MoE` beside a dense one."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "MoE in a whole step of fit"
ABOUT = """\
`Dense(256)`, then `MoE` of e experts 256 -> 512 -> 256 with k = 2, or the dense MLP of
the same FLOPs (256 -> 1024 -> 256), then `Dense(1)`; n rows of 256 numbers, one label.
A step is the function that `fit` compiles and calls: forward, losses, backward and
optimizer. The optimizer updates all experts in every step: its cost grows with e, that
of the layer does not.
"""
DENSE_ADAM, DENSE_FUSED = "dense, Adam", "dense, FusedAdam"
MOE_ADAM, MOE_FUSED = "MoE, Adam", "MoE, FusedAdam"
_ROWS, _EXPERTS = 4096, (8, 32, 128, 256)

PANELS = [{"n": _ROWS}]
BARS = [
    Bar(
        "Whole step with FusedAdam against the same model with Keras' Adam, e = 128",
        1.5,
        {"n": _ROWS, "e": 128},
        MOE_FUSED,
        MOE_ADAM,
    )
]


def groups(profile: str) -> list[Group]:
    """Return a group for each n and e."""
    points = {
        "fast": [(1024, 8)],
        "regular": [(_ROWS, e) for e in _EXPERTS] + [(1024, 128), (16384, 128)],
        "large": [(n, e) for n in (1024, _ROWS, 16384) for e in _EXPERTS],
    }[profile]
    series = [DENSE_ADAM, MOE_ADAM, MOE_FUSED]
    if profile != "fast":
        series.insert(1, DENSE_FUSED)
    return [_group(n, e, series) for n, e in points]


def _group(rows: int, experts: int, names: list[str]) -> Group:
    module = "tests.benchmarks.ours.whole_step"
    cases = [
        Case(
            series,
            "own",
            module,
            {
                "layer": series.split(",")[0],
                "rows": rows,
                "experts": experts,
                "optimizer": series.split(", ")[1],
            },
            ours=series.startswith("MoE"),
        )
        for series in names
    ]
    point = {"n": rows, "e": experts}
    return Group("whole_step", point, tuple(cases), baseline=DENSE_ADAM)
