"""Plots of training: conflicts of tasks, learning curves, calibration.

Axis letters: n rows, t tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_moe.plots._style import COLOURS, DIVERGING, axes, line, matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gradient_conflict(
    cosines: np.ndarray, tasks: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Plot the cosines between the gradients of tasks.

    Red pairs pull the shared parameters in opposite directions.

    Args:
        cosines: array of shape `(t, t)`, of `keras_moe.telemetry.gradient_conflict`.
        tasks: the t task names.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: if the shape does not fit the tasks.

    Example:

    >>> cosines = np.array([[1.0, -0.2], [-0.2, 1.0]])
    >>> ax = keras_moe.plots.gradient_conflict(cosines, ["click", "buy"])
    """
    found = np.asarray(cosines, "float64")
    if found.shape != (len(tasks), len(tasks)):
        raise ValueError(
            f"`cosines` must have the shape {(len(tasks),) * 2}, one row and column a "
            f"task. Received: shape {found.shape} for tasks={list(tasks)}"
        )
    ax = axes(ax)
    matrix(ax, found, tasks, tasks, (-1.0, 1.0), DIVERGING)
    ax.set_title("cosine of the tasks' gradients")
    return ax


def learning_curves(
    history: Mapping[str, Sequence[float]],
    tasks: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Plot the loss of each task over the epochs, in training and in validation.

    Each is divided by its first value in training, so that tasks with different losses
    fit into one picture.

    Args:
        history: dict from names of logs to one value an epoch: `history.history`.
        tasks: the names of the tasks, with the logs `{task}_loss`. Default: the total
            `loss` alone.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: if the history lacks a loss.

    Example:

    >>> history = {"loss": [1.0, 0.5], "val_loss": [1.1, 0.8]}
    >>> ax = keras_moe.plots.learning_curves(history)
    """
    names = [f"{task}_loss" for task in tasks] or ["loss"]
    missing = [name for name in names if name not in history or not history[name]]
    if missing:
        raise ValueError(
            f"`history` must have the losses {names}. Received: {sorted(history)}"
        )
    ax = axes(ax)
    for i, name in enumerate(names):
        first = history[name][0] or 1.0
        label, colour = name.removesuffix("_loss"), COLOURS[i % len(COLOURS)]
        epochs = np.arange(1, len(history[name]) + 1)
        ax.plot(
            epochs, np.array(history[name]) / first, "o-", color=colour, label=label
        )
        if f"val_{name}" in history:
            validation = np.array(history[f"val_{name}"]) / first
            ax.plot(epochs[: len(validation)], validation, "s:", color=colour)
    ax.plot([], [], "s:", color="grey", label="validation")
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss / first training loss")
    ax.set_title("learning curves")
    ax.legend(fontsize="small")
    return ax


def calibration(
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
    num_bins: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Plot how often what is predicted with a probability happens.

    Rows are sorted by prediction into bins of equal numbers.

    Args:
        predictions: dict from a name (a task, a model) to probabilities, `(n,)`.
        labels: array of 0 and 1, `(n,)`, or a dict of them by the same names. NaN:
            no label.
        num_bins: int, number of bins.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: if labels are missing, or numbers of rows differ.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> probability = rng.uniform(size=500)
    >>> happened = rng.uniform(size=500) < probability
    >>> ax = keras_moe.plots.calibration({"click": probability}, happened)
    """
    ax = axes(ax)
    highest = 0.0
    for i, (name, predicted) in enumerate(predictions.items()):
        known = labels.get(name) if isinstance(labels, Mapping) else labels
        found = np.ravel(np.asarray(predicted, "float64"))
        truth = np.ravel(np.asarray([] if known is None else known, "float64"))
        if found.shape != truth.shape or not len(found):
            raise ValueError(
                "`labels` must have one label for each prediction. "
                f"Received: {len(truth)} labels for {len(found)} of {name!r}"
            )
        found, truth = found[~np.isnan(truth)], truth[~np.isnan(truth)]
        order = np.argsort(found, kind="stable")
        bins = [b for b in np.array_split(order, num_bins) if len(b)]
        means = [found[b].mean() for b in bins]
        rates = [truth[b].mean() for b in bins]
        highest = max([highest, *means, *rates])
        ax.plot(means, rates, marker="o", label=name, **line(i))
    ax.plot([0, highest], [0, highest], ":", color="grey", label="perfect")
    ax.set_xlabel("mean prediction of a bin")
    ax.set_ylabel("share that happened")
    ax.set_title("calibration")
    ax.legend(fontsize="small")
    return ax
