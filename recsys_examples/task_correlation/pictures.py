"""Plot of the study: mean and standard deviation by correlation, and every run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from recsys_examples.plotting import line, marked
from recsys_examples.runs import replaced
from recsys_examples.task_correlation.claims import Losses, mean, standard_deviation


def draw(path: Path, losses: Losses) -> None:
    """Write the plot as PNG: means on the left, distributions on the right."""
    models = list(losses)
    correlations = sorted(losses[models[0]])
    figure, (means, runs) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(2, 3), sharey=True, layout="constrained"
    )
    # Side by side around each correlation, in the order of the legend.
    places = np.arange(len(correlations))
    offsets = (np.arange(len(models)) - (len(models) - 1) / 2) * 0.8 / len(models)
    for i, model in enumerate(models):
        values = [losses[model][p] for p in correlations]
        at, style = places + offsets[i], line(i)
        means.errorbar(
            at,
            [mean(v) for v in values],
            [standard_deviation(v) for v in values],
            **marked(i),
            capsize=3,
            label=model,
        )
        runs.boxplot(
            values,
            positions=at,
            widths=0.6 / len(models),
            showfliers=False,  # every run is plotted below
            manage_ticks=False,
            boxprops=style,
            whiskerprops=style,
            capprops={"color": style["color"]},
            medianprops={"color": style["color"]},
        )
        for place, v in zip(at, values, strict=True):
            points = {"color": style["color"], "alpha": 0.4, "ms": 5}
            runs.plot(np.full(len(v), place), v, ".", **points)
    means.set_title("mean ± standard deviation")
    means.set_ylabel("final loss: mean squared error on test rows")
    means.legend()
    runs.set_title(f"{len(values[0])} runs, quartiles")
    for ax in (means, runs):
        ax.set_xticks(places, [f"{p:g}" for p in correlations])
        ax.set_xlabel("task correlation p")
        ax.set_ylim(bottom=0)
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
    plt.close(figure)
