"""Sparse layers beside those of other libraries and the dense layer of equal FLOPs."""

from __future__ import annotations

from itertools import product
from typing import Any

from tests.benchmarks.cases import Bar, Case, Group, point_label
from tests.benchmarks.results import Row, ratio

TITLE = "MoE layers"
ABOUT = """\
A forward and backward pass of one layer, with gradients of its inputs and all weights,
without optimizer; n rows of width d = 256, e experts of 512 hidden units, the best
k = 2 for each row, float32. "MLP" are experts with two matmuls, ReLU and biases; "GLU"
those of Mixtral: three matmuls, SiLU, no biases. The dense layer is k times as wide as
an expert: it has the same FLOPs, no router and no dispatch. "graph" is TensorFlow
without XLA, the default of Keras on a CPU; PyTorch runs eagerly, its default.

All layers have the same router and expert weights, and rows that choose experts
uniformly, by Zipf's law, or all the same ones. Ours, KerasHub's and the einsums include
the load-balancing loss. A round is one step of each layer, so that caches are cold, as
within a larger model.
"""

DENSE, MOE, CAPACITY = "dense", "MoE", 'MoE, "capacity"'
KERAS_HUB, EINSUMS = "KerasHub", "one-hot einsums"
TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")

_OURS, _PEERS = "tests.benchmarks.ours", "tests.benchmarks.peers"
_ROUNDS = {"fast": 5, "regular": 11, "large": 15}
_ROWS = 8192
_HUB_ROWS = 4096  # With more and e = 64, KerasHub's block needs over 6 GiB.
_COMPILERS = {"graph": "graph", "XLA": "XLA", "JAX": "XLA"}


def groups(profile: str) -> list[Group]:
    """Return a group for each kind of experts, compiler, routing, n and e."""
    if profile == "fast":
        points = [_point(kind, n=1024, e=8) for kind in ("MLP", "GLU")]
    elif profile == "regular":
        points = [_point("MLP", e=e) for e in (4, 8, 32, 64, 128, 256)]
        points += [_point("MLP", "XLA", e=e) for e in (8, 32, 128, 256)]
        points += [_point("MLP", "JAX", e=e) for e in (8, 64)]
        points += [_point("MLP", routing=r, e=64) for r in ("Zipf", "all on one")]
        sizes = list(product((1024, _HUB_ROWS, _ROWS), (8, 64)))
        sizes += [(_ROWS, 256), (65536, 8)]
        points += [_point("GLU", n=n, e=e) for n, e in sizes]
        points += [_point("GLU", step="forward", e=e) for e in (8, 64)]
    else:
        experts = (4, 8, 16, 32, 64, 128, 256)
        grid = product(("uniform", "Zipf", "all on one"), (1024, _ROWS, 65536), experts)
        points = [
            _point(kind, routing=routing, n=n, e=e)
            for routing, n, e in grid
            for kind in ("MLP", "GLU")
        ]
        points += [_point("MLP", x, e=e) for x in ("XLA", "JAX") for e in experts]
        points += [_point("GLU", step="forward", e=e) for e in experts]
    return [_group(point, profile) for point in points]


def conclusions(rows: list[Row]) -> list[str]:
    """Return which peers are ahead, where outputs differ, and what is not equal."""
    return [_peers_ahead(rows), _differing_outputs(rows), *_notes(rows)]


def _point(
    kind: str,
    compiler: str = "graph",
    routing: str = "uniform",
    n: int = _ROWS,
    e: int = 8,
    step: str = "training",
) -> dict[str, Any]:
    return {
        "experts": kind,
        "compiler": compiler,
        "step": step,
        "routing": routing,
        "n": n,
        "e": e,
    }


def _hub_point(e: int) -> dict[str, Any]:
    return _point("GLU", n=_HUB_ROWS, e=e)


PANELS = [
    {key: value for key, value in point.items() if key != "e"}
    for point in (_point("MLP"), _point("MLP", "XLA"), _point("GLU"))
]
BARS = [
    Bar(
        f"MoE against the dense layer, {compiler}, e = {e}",
        target,
        _point("MLP", compiler, e=e),
        MOE,
        DENSE,
    )
    for compiler, targets in {
        "graph": {8: 0.93, 32: 0.90, 128: 0.75, 256: 0.65},
        "XLA": {8: 0.90, 32: 0.75, 128: 0.60, 256: 0.50},
    }.items()
    for e, target in targets.items()
] + [
    Bar(f"MoE against KerasHub, e = {e}", target, _hub_point(e), MOE, KERAS_HUB)
    for e, target in {8: 4.0, 64: 20.0}.items()
]


def _group(point: dict[str, Any], profile: str) -> Group:
    return Group(
        "moe_layers",
        point,
        tuple(_cases(point, profile)),
        baseline=DENSE,
        rounds=min(7, _ROUNDS[profile]) if _is_slow(point) else _ROUNDS[profile],
        steps=1,
    )


def _is_slow(point: dict[str, Any]) -> bool:
    """Return whether a step of a peer takes seconds."""
    all_experts = point["experts"] == "GLU" and point["n"] * point["e"] >= 2**18
    return all_experts or point["n"] > _ROWS


def _cases(point: dict[str, Any], profile: str) -> list[Case]:
    common = {
        "sizes": {"rows": point["n"], "experts": point["e"]},
        "routing": point["routing"],
        "step": point["step"],
    }
    kind, compiler = point["experts"], point["compiler"]
    backend = {"KERAS_BACKEND": "jax" if compiler == "JAX" else "tensorflow"}
    own = {**common, "kind": kind, "compiler": _COMPILERS[compiler]}
    cases = [
        Case(DENSE, "own", f"{_OURS}.dense_layers", own, backend),
        Case(MOE, "own", f"{_OURS}.sparse_layers", own, backend, ours=True),
    ]
    if kind == "MLP" and profile != "fast":
        capacity = {**own, "dispatch": "capacity"}
        module = f"{_OURS}.sparse_layers"
        cases.append(Case(CAPACITY, "own", module, capacity, backend, ours=True))
    if compiler != "graph":
        return cases
    if kind == "MLP":
        return [
            *cases,
            Case(EINSUMS, "own", f"{_PEERS}.einsum_switch", common, backend),
            Case("mixture-of-experts", "torch", f"{_PEERS}.mixture_of_experts", common),
        ]
    # "batched_mm" copies the kernels of its k experts for each row: seconds a step.
    slow = (point["n"], point["e"]) == (1024, 8) if profile == "regular" else True
    names = TRANSFORMERS if slow and profile != "fast" else TRANSFORMERS[:2]
    return [
        *cases,
        Case(KERAS_HUB, "keras_hub", f"{_PEERS}.keras_hub", common, backend),
        *(
            Case(
                f"transformers, {name}",
                "torch",
                f"{_PEERS}.transformers_mixtral",
                {**common, "implementation": name},
            )
            for name in names
        ),
        Case("st-moe-pytorch", "torch", f"{_PEERS}.st_moe", common),
    ]


def _by_group(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "measured":
            found.setdefault(point_label(row.point), []).append(row)
    return found


def _peers_ahead(rows: list[Row]) -> str:
    ahead = []
    for label, group in _by_group(rows).items():
        ours = next((row for row in group if row.series == MOE), None)
        for row in group:
            if ours is None or row.ours or row.series == DENSE:
                continue
            speed = ratio(row, ours)
            if speed and speed.median < 1:
                ahead.append(
                    f"{row.series} is {1 / speed.median:.2f} times as fast ({label})"
                )
            peaks = row.peak_mib, ours.peak_mib
            if None not in peaks and row.peak_mib < ours.peak_mib:
                ahead.append(
                    f"{row.series} needs {row.peak_mib:,.0f} MiB, "
                    f"`MoE` {ours.peak_mib:,.0f} MiB ({label})"
                )
    if not ahead:
        return "No peer is faster than `MoE` or needs less memory."
    return "\n".join(["Peers ahead of `MoE`:", "", *(f"- {text}" for text in ahead)])


def _differing_outputs(rows: list[Row]) -> str:
    differing = []
    for label, group in _by_group(rows).items():
        values = {row.series: row.facts.get("output_rms") for row in group}
        expected = values.get(MOE)
        differing += [
            f"{series} ({label}): root mean square {value:.6f}, `MoE` {expected:.6f}"
            for series, value in values.items()
            if value and expected and abs(value / expected - 1) > 1e-5
        ]
    if not differing:
        return "All sparse layers of a group have equal outputs."
    return "\n".join(
        [
            "Outputs are equal but for these, which drop choices or have another "
            "activation:",
            "",
            *(f"- {text}" for text in differing),
        ]
    )


def _notes(rows: list[Row]) -> list[str]:
    notes = {row.series: row.facts["note"] for row in rows if "note" in row.facts}
    if not notes:
        return []
    lines = [f"- {series}: {note}" for series, note in notes.items()]
    return ["\n".join(["What differs between the layers:", "", *lines])]
