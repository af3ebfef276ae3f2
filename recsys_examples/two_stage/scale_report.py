"""The table and the figure of the latency by size of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from recsys_examples.plotting import REFERENCE, marked
from recsys_examples.two_stage.latency import BATCH
from recsys_examples.two_stage.scale import FULL, RANKER_OF_ALL, SEARCHED, TWO_STAGES

BAR = 1 / 3  # of the time of ranking the full catalogue
_NAMES = (TWO_STAGES, SEARCHED, FULL, RANKER_OF_ALL)
_KINDS = {"one_ms": "1 user", "batch_ms": f"{BATCH} users"}
# size -> threads -> the figures of `scale.measure`
Found = Mapping[int, Mapping[int, Mapping[str, Any]]]


def crossing(sizes: Sequence[int], ratios: Sequence[float], level: float) -> float:
    """Return the size from which all ratios are at most a level, interpolated.

    Between two sizes, both axes are logarithmic. Infinity if the last ratio is above
    the level, and the first size if none is.

    Args:
        sizes: increasing sizes.
        ratios: the ratio at each size.
        level: the level.
    """
    above = np.flatnonzero(np.array(ratios) > level)
    if not len(above):
        return float(sizes[0])
    n = int(above[-1])
    if n + 1 == len(sizes):
        return float("inf")
    falling = np.log(ratios[n : n + 2])[::-1]
    return float(
        np.exp(np.interp(np.log(level), falling, np.log(sizes[n : n + 2])[::-1]))
    )


def ratios(found: Found, threads: int, kind: str, name: str) -> list[float]:
    """Return the time of two stages as a share of the full catalogue's, by size."""
    models = [found[size][threads]["models"] for size in sorted(found)]
    return [
        m[name][kind] / m[FULL][kind] if name in m else float("nan") for m in models
    ]


def table(found: Found) -> str:
    """Return a Markdown table of medians in ms, a row per size, users and threads."""
    lines = [
        f"| movies | threads | users | {' | '.join(_NAMES)} | share | with faiss |",
        "|---" * (len(_NAMES) + 5) + "|",
    ]
    for size in sorted(found):
        for threads, figures in sorted(found[size].items()):
            models = figures["models"]
            for kind, users in _KINDS.items():
                times = [_milliseconds(models.get(name), kind) for name in _NAMES]
                shares = [
                    f"{models[name][kind] / models[FULL][kind]:.2f}"
                    if name in models
                    else "-"
                    for name in (TWO_STAGES, SEARCHED)
                ]
                cells = [f"{size:,}", str(threads), users.split()[0], *times, *shares]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _milliseconds(model: Mapping[str, float] | None, kind: str) -> str:
    return "absent" if model is None else f"{model[kind]:,.1f}"


def summary(found: Found) -> list[str]:
    """Return lines: where two stages are faster, where by the bar, and the memory."""
    sizes = sorted(found)
    lines = []
    for threads in sorted(found[sizes[0]]):
        for kind, users in _KINDS.items():
            shares = ratios(found, threads, kind, TWO_STAGES)
            faster, third = (crossing(sizes, shares, level) for level in (1.0, BAR))
            lines.append(
                f"{threads} thread(s), {users}: faster from {_movies(faster)}, in a "
                f"third of the time from {_movies(third)}"
            )
    peak = max(f["memory_gib"] for by in found.values() for f in by.values())
    lines.append(f"peak memory of a process with all models: {peak:.1f} GiB")
    recalls = {
        size: figures["models"][SEARCHED]["recall"]
        for size, by in found.items()
        for figures in by.values()
        if SEARCHED in figures["models"]
    }
    lines += [f"recall of faiss at {size:,}: {r:.3f}" for size, r in recalls.items()]
    if not recalls:
        lines.append("faiss is not installed (pip install faiss-cpu): series absent")
    return lines


def _movies(size: float) -> str:
    return f"{float(f'{size:.2g}'):,.0f} movies" if np.isfinite(size) else "no size"


def draw(file: Path, found: Found) -> None:
    """Write a picture: time by size, a panel per number of threads and of users."""
    sizes = sorted(found)
    threads = sorted(found[sizes[0]])
    figure, axes = plt.subplots(
        len(_KINDS),
        len(threads),
        figsize=(4.5 * len(threads), 7),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for row, (kind, users) in zip(axes, _KINDS.items(), strict=True):
        for ax, count in zip(row, threads, strict=True):
            _panel(ax, found, count, kind)
            ax.set_title(f"{users}, {count} thread{'s' * (count > 1)}")
    for ax in axes[-1]:
        ax.set_xlabel("movies")
    for ax in axes[:, 0]:
        ax.set_ylabel("ms per call")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _panel(ax: Any, found: Found, threads: int, kind: str) -> None:
    sizes = sorted(found)
    models = [found[size][threads]["models"] for size in sizes]
    for i, name in enumerate(_NAMES):
        known = [
            (s, m[name][kind]) for s, m in zip(sizes, models, strict=True) if name in m
        ]
        if known:
            ax.plot(*zip(*known, strict=True), **marked(i), label=name, markersize=4)
    full = [m[FULL][kind] for m in models]
    ax.plot(sizes, np.array(full) * BAR, ":", color="grey", label="a third of full")
    shares = ratios(found, threads, kind, TWO_STAGES)
    for level, label in ((1.0, "faster"), (BAR, "a third")):
        size = crossing(sizes, shares, level)
        if sizes[0] < size < np.inf:
            ax.axvline(size, **REFERENCE)
            ax.annotate(
                f"{label}\n{_movies(size)}",
                (size, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize="x-small",
            )
    ax.set(xscale="log", yscale="log")
