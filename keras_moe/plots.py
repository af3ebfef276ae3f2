"""Plots of gates: how much each task uses each expert.

Axis letters: n rows, t tasks, e experts. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gate_heatmap(
    gate_weights: np.ndarray, tasks: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Plot the mean gate weight of each task for each expert.

    Args:
        gate_weights: array of shape `(..., t, e)`, such as from `MMoE.gate_weights`.
        tasks: the t task names.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Example:

    >>> weights = np.full((10, 2, 4), 0.25)
    >>> ax = keras_moe.plots.gate_heatmap(weights, ["click", "buy"])
    """
    ax = _axes(ax)
    means = _by_task(gate_weights, tasks).mean(axis=0)
    image = ax.imshow(
        means, vmin=0.0, vmax=max(means.max(), 1e-9), cmap="Blues", aspect="auto"
    )
    for (row, column), value in np.ndenumerate(means):
        dark = value > 0.6 * means.max()
        ax.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            color="white" if dark else "black",
        )
    ax.set_yticks(range(len(tasks)), list(tasks))
    ax.set_xticks(range(means.shape[1]))
    ax.set_xlabel("expert")
    ax.set_title("mean gate weight")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    return ax


def expert_usage(
    gate_weights: np.ndarray, tasks: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Plot, for each expert, the share of rows in which it has the largest weight.

    A bar far above the others means that a task's gate is polarized on one expert; an
    expert without bars is unused.

    Args:
        gate_weights: array of shape `(..., t, e)`.
        tasks: the t task names.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Example:

    >>> weights = np.full((10, 2, 4), 0.25)
    >>> ax = keras_moe.plots.expert_usage(weights, ["click", "buy"])
    """
    ax = _axes(ax)
    weights = _by_task(gate_weights, tasks)
    num_experts = weights.shape[-1]
    width = 0.8 / len(tasks)
    for t, task in enumerate(tasks):
        favourites = weights[:, t].argmax(axis=-1)
        shares = np.bincount(favourites, minlength=num_experts) / len(weights)
        positions = np.arange(num_experts) + (t - (len(tasks) - 1) / 2) * width
        ax.bar(positions, shares, width, label=task)
    ax.axhline(1 / num_experts, color="grey", linestyle=":", label="even")
    ax.set_xticks(range(num_experts))
    ax.set_xlabel("expert")
    ax.set_ylabel("share of rows")
    ax.set_title("expert usage")
    ax.legend()
    return ax


def _by_task(gate_weights: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """(..., t, e) -> (n, t, e), after checking the number of tasks."""
    weights = np.asarray(gate_weights)
    if weights.ndim < 3 or weights.shape[-2] != len(tasks):
        raise ValueError(
            "`gate_weights` must have the shape (..., tasks, experts). Received: "
            f"shape {weights.shape} for tasks={list(tasks)}"
        )
    return weights.reshape(-1, *weights.shape[-2:])


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()
