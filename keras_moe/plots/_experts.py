"""Plots of experts: how alike they are, and their load over time.

Axis letters: e experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_moe.plots._style import COLOURS, DIVERGING, SMALL, axes, line, matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def expert_similarity(
    similarity: np.ndarray, title: str = "similarity of experts", ax: Axes | None = None
) -> Axes:
    """Plot a matrix of similarities between experts.

    Args:
        similarity: array of shape `(e, e)` in [-1, 1], such as "output_similarity" of
            `keras_moe.telemetry.summarise`.
        title: str, the title.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: if `similarity` is not square.

    Example:

    >>> ax = keras_moe.plots.expert_similarity(np.eye(4))
    """
    similarity = _square("similarity", similarity)
    ax = axes(ax)
    experts = range(len(similarity))
    matrix(
        ax,
        similarity,
        experts,
        experts,
        (-1.0, 1.0),
        DIVERGING,
        labels=("expert", "expert", "similarity"),
    )
    ax.set_title(title)
    return ax


def load_over_time(
    observations: Sequence[dict[str, Any]], mixture: str, ax: Axes | None = None
) -> Axes:
    """Plot the load of each expert over the training.

    Args:
        observations: those of a `keras_moe.callbacks.ExpertMonitor`.
        mixture: str, the name of the mixture.
        ax: matplotlib axes to draw on. Default: the current axes.

    Returns:
        The axes. With more than 12 experts, the area between the smallest and the
        largest load and the quartiles are shown instead of lines.

    Raises:
        ValueError: if there is no observation of that name.

    Example:

    >>> seen = [
    ...     {"step": step, "mixtures": {"moe": {"load": np.array([0.5, 0.5])}}}
    ...     for step in (10, 20)
    ... ]
    >>> ax = keras_moe.plots.load_over_time(seen, "moe")
    """
    known = sorted({name for seen in observations for name in seen["mixtures"]})
    if mixture not in known:
        raise ValueError(
            f"`mixture` must be one of {known}, the mixtures of `observations`. "
            f"Received: mixture={mixture!r}"
        )
    ax = axes(ax)
    found = [
        (seen["step"], seen["mixtures"][mixture]["load"])
        for seen in observations
        if mixture in seen["mixtures"]
    ]
    # A file may have those of an earlier model first.
    e = len(found[-1][1])
    steps = [step for step, load in found if len(load) == e]
    loads = np.stack([load for _, load in found if len(load) == e])
    if e <= 12:
        for k in range(e):
            ax.plot(steps, loads[:, k], label=f"expert {k}", **line(k))
        ax.legend(fontsize=SMALL, ncols=2)
    else:
        low, first, median, third, high = np.quantile(loads, np.linspace(0, 1, 5), 1)
        ax.fill_between(steps, low, high, color=COLOURS[5], alpha=0.3, label="all")
        ax.fill_between(steps, first, third, color=COLOURS[0], alpha=0.4, label="half")
        ax.plot(steps, median, color=COLOURS[0], label="median")
        ax.legend(fontsize=SMALL)
    ax.axhline(1 / e, color="grey", linestyle=":")
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel("batches trained")
    ax.set_ylabel("load (dotted: even)")
    ax.set_title(f"load of the experts of {mixture}")
    return ax


def _square(name: str, values: Any) -> np.ndarray:
    found = np.asarray(values, "float64")
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"`{name}` must be square. Received: shape {found.shape}")
    return found
