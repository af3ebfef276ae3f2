"""Plots of training: conflicts of tasks, learning curves, calibration.

Axis letters: n rows, t tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_moe import _checks
from keras_moe.plots._style import DIVERGING, SMALL, axes, line, matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gradient_conflict(
    cosines: np.ndarray, tasks: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Plot the cosines between the gradients of tasks.

    Red pairs pull the shared parameters in opposite directions. A task without a
    gradient (NaN) is grey.

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
    matrix(
        ax,
        found,
        tasks,
        tasks,
        (-1.0, 1.0),
        DIVERGING,
        labels=("task", "task", "cosine"),
        missing="no gradient",
    )
    ax.set_title("cosine of the tasks' gradients")
    return ax


def learning_curves(
    history: Mapping[str, Sequence[float]],
    tasks: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Plot the loss of each task over the epochs, in training and in validation.

    Each is divided by the size of its first value in training, so that tasks with
    different losses fit into one picture. A negative loss stays below 0. Validation is
    thin, with squares.

    Args:
        history: dict from names of logs to one value an epoch, lists or arrays:
            `history.history`.
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
    missing = [name for name in names if not len(history.get(name, ()))]
    if missing:
        raise ValueError(
            f"`history` must have the losses {names}. Received: {sorted(history)}"
        )
    ax = axes(ax)
    from matplotlib.ticker import MaxNLocator

    for i, name in enumerate(names):
        first = float(history[name][0])
        size = abs(first) if np.isfinite(first) and first else 1.0
        own = {"label": name.removesuffix("_loss"), **line(i)}
        _curve(ax, np.asarray(history[name]) / size, **_TRAINING, **own)
        if len(history.get(f"val_{name}", ())):
            _curve(
                ax, np.asarray(history[f"val_{name}"]) / size, **_VALIDATION, **line(i)
            )
    if any(len(history.get(f"val_{name}", ())) for name in names):
        for label, style in (("training", _TRAINING), ("validation", _VALIDATION)):
            ax.plot([], [], color="grey", label=label, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    is_negative = any(history[name][0] < 0 for name in names)
    divisor = "|first training loss|" if is_negative else "first training loss"
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"loss / {divisor}")
    ax.set_title("learning curves")
    ax.legend(fontsize=SMALL)
    return ax


_TRAINING: dict[str, Any] = {"marker": "o", "linewidth": 2.0}
_VALIDATION: dict[str, Any] = {
    "marker": "s",
    "linewidth": 1.0,
    "markerfacecolor": "none",
}


def _curve(ax: Axes, values: np.ndarray, **style: Any) -> None:
    ax.plot(np.arange(1, len(values) + 1), values, **style)


def calibration(
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray | Mapping[str, np.ndarray],
    num_bins: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Plot how often what is predicted with a probability happens.

    Rows are sorted by prediction into bins of equal numbers.

    Args:
        predictions: dict from a name (a task, a model) to probabilities, `(n,)`.
        labels: array of 0 and 1, `(n,)`, or a dict of them by the same names. NaN:
            no label.
        num_bins: int, number of bins, at least 1.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: if labels are missing, numbers of rows differ, or `num_bins` is not
            positive.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> probability = rng.uniform(size=500)
    >>> happened = rng.uniform(size=500) < probability
    >>> ax = keras_moe.plots.calibration({"click": probability}, happened)
    """
    num_bins = _checks.positive_int("num_bins", num_bins)
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
    ax.legend(fontsize=SMALL)
    return ax
