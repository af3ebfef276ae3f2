"""The page of the figures for TPU, and its picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tests.benchmarks.accelerators import (
    COMMON,
    DEVICES,
    NAMES,
    cases,
    counterpart,
    label,
)

PICTURE = "figures/accelerators.png"
GOALS = """\
Goals of "ragged" ("auto" on JAX), MMoE and PLE, relative to the dense MLP: FLOPs ≤ 1.35
(e = 8, 64, 256); bytes accessed ≤ 3, temporary memory ≤ 2.5 and time ≤ 1.5 at e = 8 and
for MMoE and PLE, which compute all experts; time ≤ 2 at e = 64. "capacity" has one
goal: FLOPs ≤ 1.4 times those of its own slots. The other rows are there to compare."""

_HEAD = """\
# Accelerators

This page was written by `python -m tests.benchmarks.accelerators page FILE.json`. All
figures are **compiled for** a TPU and **run on** none: they are what the compiler of
the TPU (`libtpu` {libtpu}, JAX {jax}, on a CPU) says of its program for one chip. No
time on this page was measured.

A program is the forward and the backward pass of one layer, with gradients of its
inputs and all weights, its load-balancing loss, and no optimizer: n = {rows:,} rows,
d = {features:,} features, experts with h = {hidden:,} hidden units, the best {top_k}
of a row, bfloat16 with kernels kept in float32 (the cast is a part of the program; at
e = 256 kernels are bfloat16, for both layers: float32 would not fit a v5e). The dense
MLP has k h hidden units: as many FLOPs, without router and dispatch.

- *TFLOP* and *bytes* are XLA's `cost_analysis`. For kernels it uses their own
  estimates: rows, weights and results as often as they are read or written. A tile of
  rows that two experts share is computed twice: our kernels count it, those of
  `ragged_dot` do not.
- *Loops* with a data-dependent number of turns count once, so "blocked" in turn, the
  form for CPU, has no row here.
- *Bytes* count a gather of rows with the tiles that it reads.
- *Time* is the sum of the compiler's `estimated_cycles` by the clock of a core, plus,
  for what has no such estimate: kernels, by their FLOPs and the peak of the chip or by
  their bytes and its bandwidth, whichever takes longer, and gathers, by the bytes of
  each row once. "none": the compiler has no number of cycles for a kernel. (XLA's
  `optimal_seconds` is negative for these programs.)
- *MMoE and PLE* compute experts in turn, and a mixture as a sum of their outputs, which
  are written once and read three times: by the mixtures, by the gradient of the gates
  and by their own. Where their time misses its goal, it is the time of these reads, and
  in PLE that of the gates of each stream, whose matmuls have few columns. A v6e has 4.7
  times the FLOP/s of a v5e and twice its bandwidth: reads weigh more.

{goals}

![Cost of a step relative to the dense MLP]({picture})
"""
PEAKS = {"v5e": 197e12, "v6e": 918e12}
BANDWIDTHS = {"v5e": 819e9, "v6e": 1640e9}
LIMITS = {
    8: {"bytes": 3.0, "temporary_bytes": 2.5, "seconds": 1.5},
    64: {"seconds": 2.0},
}
_MEASURES = ("flops", "bytes", "temporary_bytes", "seconds")
_TITLES = ("FLOPs", "bytes", "memory", "time")


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page."""
    versions = {"libtpu": "0.0.42.1", "jax": "0.10.2"}
    parts = [_HEAD.format(**COMMON, **versions, goals=GOALS, picture=PICTURE)]
    for device in DEVICES:
        rows = [
            entry for entry in results.values() if entry["case"]["device"] == device
        ]
        if rows:
            parts += [f"## {device}\n", _table(rows, results), *_missed(rows, results)]
        missing = [
            case
            for case in cases()
            if case["device"] == device and label(case) not in results
        ]
        if missing:
            parts += [f"Not compiled yet for {device}: {_list(missing)}."]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _list(missing: list[dict[str, Any]]) -> str:
    layers = dict.fromkeys(
        _name(case) + (f" at e = {case['experts']}" if "experts" in case else "")
        for case in missing
    )
    return "; ".join(layers)


def _table(rows: list[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    lines = [
        "| layer | e | TFLOP | bytes, GB | temporary, GB | time, ms |"
        " FLOPs | bytes | memory | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        case, figures = entry["case"], entry["figures"]
        cells = [_name(case), str(case.get("experts", ""))]
        if "error" in figures:
            error = figures["error"].replace("|", "/")
            lines.append(f"| {' | '.join([*cells, error, *[''] * 7])} |")
            continue
        estimated = time_of(case, figures)
        cells += [
            f"{figures['flops'] / 1e12:.2f}",
            f"{figures['bytes'] / 1e9:.1f}",
            f"{figures['temporary_bytes'] / 1e9:.2f}",
            "none" if math.isnan(estimated) else f"{1e3 * estimated:.0f}",
        ]
        ratios = ratios_of(entry, results)
        values = [(ratios or {}).get(name, math.nan) for name in _MEASURES]
        cells += ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _missed(rows: list[Mapping[str, Any]], results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for the goals that "ragged", MMoE and PLE miss."""
    missed = []
    for entry in rows:
        case, ratios = entry["case"], ratios_of(entry, results)
        if case.get("dispatch", "ragged") != "ragged" or ratios is None:
            continue
        sparse = case["layer"] == "MoE"
        limits = {"flops": 1.35, **LIMITS.get(case["experts"] if sparse else 8, {})}
        place = f"at e = {case['experts']}" if sparse else f"of {case['layer']}"
        missed += [
            f"{title} {place} ({ratios[measure]:.2f})"
            for measure, title in zip(_MEASURES, _TITLES, strict=True)
            if ratios[measure] > limits.get(measure, float("inf"))
        ]
    if missed:
        yield f"Not reached: {', '.join(missed)}."


def _name(case: Mapping[str, Any]) -> str:
    if case["layer"] == "MoE":
        return NAMES[case["dispatch"]]
    if case["layer"] != "dense":
        return f"{case['layer']}, h = {case['hidden']}"
    levels = f", {case['levels']} times" if case.get("levels", 1) > 1 else ""
    half = ", bfloat16 kernels" if case["dtype"] == "bfloat16" else ""
    return f"dense MLP, {case['hidden']:,} hidden units{levels}{half}"


def time_of(case: Mapping[str, Any], figures: Mapping[str, float]) -> float:
    """Return the estimate of a step in seconds, or NaN: see the head of the page."""
    device = case["device"]
    # For some kernels on a v6e, the compiler's number of cycles is the highest integer.
    if figures["cycle_seconds"] > 1000:
        return math.nan
    peak, bandwidth = PEAKS[device], BANDWIDTHS[device]
    kernels = sum(
        max(flops / peak, moved / bandwidth) for flops, moved in figures["kernels"]
    )
    return figures["cycle_seconds"] + kernels + figures["gather_bytes"] / bandwidth


def ratios_of(
    entry: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, float] | None:
    """Return the figures by those of the dense layer of equal FLOPs, or None."""
    case, figures = entry["case"], entry["figures"]
    if case["layer"] == "dense" or "error" in figures:
        return None
    found = results.get(label(counterpart(case)))
    if found is None or "error" in found["figures"]:
        return None
    dense = found["figures"]
    by = {name: figures[name] / dense[name] for name in _MEASURES[:-1]}
    times = time_of(case, figures) / time_of(found["case"], dense)
    return {**by, "seconds": times}


def _bars(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    for entry in results.values():
        case, ratios = entry["case"], ratios_of(entry, results)
        if ratios and case["device"] == DEVICES[0]:
            name = case.get("dispatch", case["layer"])
            name = name.replace("automatic gradient", "ragged before")
            yield f"{name}\ne = {case['experts']}", ratios


def png(results: Mapping[str, Any]) -> bytes:
    """Return the picture: the ratios of each layer on the first device."""
    from matplotlib.figure import Figure

    bars = list(_bars(results))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(_MEASURES)
    for i, (measure, title) in enumerate(zip(_MEASURES, _TITLES, strict=True)):
        places = [x + (i - 1.5) * width for x in range(len(bars))]
        axis.bar(places, [r[measure] for _, r in bars], width, label=title)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log", base=2)
    ticks = [0.5, 1, 2, 4, 8, 16]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axis.set_ylabel("dense MLP = 1")
    axis.set_title(f"compiled for TPU {DEVICES[0]}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=len(_MEASURES))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
