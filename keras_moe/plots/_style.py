"""One style for all plots: colours for the colour-blind, and the axes to draw on."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008; told apart with every kind of colour blindness, and in print by the
# line styles beside them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
SEQUENTIAL = "Blues"
DIVERGING = "RdBu"


def axes(ax: Axes | None) -> Axes:
    """Return `ax`, or the current axes."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()


def line(i: int) -> dict[str, Any]:
    """Return colour and line style of the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[(i + 2 * (i // len(COLOURS))) % len(LINES)],
    }


def matrix(
    ax: Axes,
    values: np.ndarray,
    rows: Any,
    columns: Any,
    limits: tuple[float, float],
    cmap: str,
    form: str = "{:.2f}",
) -> None:
    """Draw a matrix with its values as text (if there are not too many)."""
    image = ax.imshow(values, vmin=limits[0], vmax=limits[1], cmap=cmap, aspect="auto")
    middle = (limits[0] + limits[1]) / 2
    for (row, column), value in np.ndenumerate(values):
        if values.size > 144 or not np.isfinite(value):
            continue
        dark = value > 0.6 * limits[1]
        if cmap == DIVERGING:  # Dark at both ends.
            dark = abs(value - middle) > 0.6 * (limits[1] - middle)
        colour = "white" if dark else "black"
        ax.text(column, row, form.format(value), ha="center", va="center", color=colour)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_xticks(range(len(columns)), list(columns))
    ax.figure.colorbar(image, ax=ax, shrink=0.8)


def as_png(plot: Callable[..., Any], *arguments: Any) -> bytes:
    """Return what `plot(*arguments, ax=)` draws, as the content of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which may open windows and counts figures.
    figure = Figure(figsize=(7, 3.5), layout="tight")
    FigureCanvasAgg(figure)
    plot(*arguments, ax=figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
