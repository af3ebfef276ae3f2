"""The map: gains of mixtures over a shared bottom, a panel per factor."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from recsys_examples.click_conversion.regimes import Gain
from recsys_examples.click_conversion.settings import MIXTURES
from recsys_examples.plotting import REFERENCE, marked
from recsys_examples.runs import replaced


def draw(path: Path, gains: list[Gain]) -> None:
    """Write the map as PNG: a row per mixture, a column per factor."""
    factors = list(dict.fromkeys(gain.cell.factor for gain in gains))
    figure, axes = plt.subplots(
        len(MIXTURES),
        len(factors),
        figsize=(3.2 * len(factors), 3.2 * len(MIXTURES)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for first, row, model in zip((True, False), axes, MIXTURES, strict=True):
        for ax, factor in zip(row, factors, strict=True):
            here = [g for g in gains if g.model == model and g.cell.factor == factor]
            _panel(ax, here)
            ax.set_xlabel(factor)
            if first and any(gain.cell.line for gain in here):
                ax.legend(fontsize="small", loc="lower right")
        row[0].set_ylabel(f"{model} - SharedBottom, AUC")
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
    plt.close(figure)


def _panel(ax: plt.Axes, gains: list[Gain]) -> None:
    lines = list(dict.fromkeys(gain.cell.line for gain in gains))
    levels = sorted({gain.cell.level for gain in gains})
    ax.axhline(0, **REFERENCE)
    for i, line in enumerate(lines):
        mine = sorted(
            (gain for gain in gains if gain.cell.line == line),
            key=lambda gain: gain.cell.level,
        )
        # Beside each other, as levels of different factors are not on one scale.
        places = [levels.index(g.cell.level) + 0.08 * (i - 1) for g in mine]
        means = np.array([gain.mean for gain in mine])
        ends = np.array([[g.mean - g.low, g.high - g.mean] for g in mine]).T
        ax.errorbar(places, means, ends, **marked(i), capsize=3, label=line or None)
    ax.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
