"""Plots of gates: how much each task, or each kind of row, uses each expert.

Axis letters: n rows, t tasks, e experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_moe import _checks
from keras_moe.plots._style import (
    SEQUENTIAL,
    SMALL,
    axes,
    bars,
    matrix,
    spread_ticks,
)

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
    ax = axes(ax)
    means = _by_task(gate_weights, tasks).mean(axis=0)
    labels = ("expert", "gate", "mean gate weight")
    matrix(
        ax,
        means,
        tasks,
        range(means.shape[1]),
        _limits(means),
        SEQUENTIAL,
        labels=labels,
    )
    ax.set_title("mean gate weight")
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
    ax = axes(ax)
    weights = _by_task(gate_weights, tasks)
    num_experts = weights.shape[-1]
    width = 0.8 / len(tasks)
    for t, task in enumerate(tasks):
        favourites = weights[:, t].argmax(axis=-1)
        shares = np.bincount(favourites, minlength=num_experts) / len(weights)
        positions = np.arange(num_experts) + (t - (len(tasks) - 1) / 2) * width
        ax.bar(positions, shares, width, label=task, **bars(t))
    ax.axhline(1 / num_experts, color="grey", linestyle=":", label="even")
    spread_ticks(ax, list(range(num_experts)))
    ax.set_xlabel("expert")
    ax.set_ylabel("share of rows")
    ax.set_title("expert usage")
    ax.legend(fontsize=SMALL)
    return ax


def who_goes_where(
    weights: np.ndarray,
    values: Sequence[object],
    *,
    most: int = 12,
    ax: Axes | None = None,
) -> Axes:
    """Plot the mean weight of each expert for the rows of each value of a feature.

    Such as the genre of a movie, the age group of a user or the class of an image: it
    shows what an expert has come to stand for. If experts ignore the feature, all rows
    of the picture are alike.

    Args:
        weights: array of shape `(n, e)`, the weights of one gate or router: for example
            `mixture.weights[:, 0]` of `keras_moe.telemetry.observe`.
        values: the n values of the feature.
        most: int, the number of most frequent values that are shown.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not fit.

    Example:

    >>> weights = np.eye(4)[[0, 0, 1, 2]]
    >>> genres = ["drama", "drama", "comedy", "crime"]
    >>> ax = keras_moe.plots.who_goes_where(weights, genres)
    """
    weights, kinds = np.asarray(weights), np.asarray(list(map(str, values)))
    if weights.ndim != 2 or len(weights) != len(kinds) or not len(kinds):
        raise ValueError(
            "`weights` must have the shape (rows, experts), with one of `values` a "
            f"row. Received: shape {weights.shape} and {len(kinds)} values"
        )
    most = _checks.positive_int("most", most)
    ax = axes(ax)
    found, counts = np.unique(kinds, return_counts=True)
    shown = found[np.argsort(-counts, kind="stable")[:most]]
    means = np.stack([weights[kinds == kind].mean(axis=0) for kind in shown])
    names = [f"{kind} ({(kinds == kind).sum()})" for kind in shown]
    labels = ("expert", "value (rows)", "mean weight")
    matrix(
        ax,
        means,
        names,
        range(weights.shape[1]),
        _limits(means),
        SEQUENTIAL,
        labels=labels,
    )
    ax.set_title("mean weight of an expert")
    return ax


def _limits(means: np.ndarray) -> tuple[float, float]:
    """Return 0 and the largest mean."""
    return 0.0, float(means[np.isfinite(means)].max(initial=1e-9))


def _by_task(gate_weights: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """(..., t, e) -> (n, t, e), after checking the number of tasks."""
    weights = np.asarray(gate_weights)
    if weights.ndim < 3 or weights.shape[-2] != len(tasks):
        raise ValueError(
            "`gate_weights` must have the shape (..., tasks, experts). Received: "
            f"shape {weights.shape} for tasks={list(tasks)}"
        )
    return weights.reshape(-1, *weights.shape[-2:])
