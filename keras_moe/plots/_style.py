"""One style for all plots: colours for the colour-blind, and the axes to draw on."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe & Ito 2008 but for their black, which is not seen on a dark page: a violet, as
# far from the others with every kind of colour blindness. In print, lines and bars are
# told apart by the styles below.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#9933FF")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx")
SEQUENTIAL = "Blues"
DIVERGING = "RdBu"
MISSING = "#BBBBBB"  # no value; light enough beside both ends of the colours
SMALL = 9.0  # points, of legends
# Inches of a picture on a page. On a phone, 358 CSS px wide, 9 points are 10 CSS px.
# 150 dots per inch are 1.4 pixels per CSS px of a page, 1.8 on a phone; with 200 the
# file is a third larger, and the text no easier to read.
SIZE, DPI = (4.4, 3.3), 150
_NEEDED = "`keras_moe.plots` needs matplotlib: run `pip install matplotlib`"
_CHARACTER = 0.65  # width of a digit over the size of the font


def axes(ax: Axes | None) -> Axes:
    """Return `ax`, or the current axes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    return plt.gca()


def line(i: int) -> dict[str, Any]:
    """Return colour and line style of the i-th line. 28 lines differ."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[_variant(i)]}


def bars(i: int) -> dict[str, Any]:
    """Return colour and hatch of the i-th group of bars. 28 groups differ."""
    return {
        "facecolor": COLOURS[i % len(COLOURS)],
        "hatch": HATCHES[_variant(i)],
        "edgecolor": "white",  # of the hatch
        "linewidth": 0,
    }


def _variant(i: int) -> int:
    return (i + 2 * (i // len(COLOURS))) % len(LINES)


def matrix(
    ax: Axes,
    values: np.ndarray,
    rows: Any,
    columns: Any,
    limits: tuple[float, float],
    cmap: str,
    *,
    labels: tuple[str, str, str],
    missing: str = "no value",
) -> None:
    """Draw a matrix, with its values as text where they fit.

    Args:
        ax: the axes.
        values: array of two dimensions; NaN: no value.
        rows: their names.
        columns: their names.
        limits: the values of the first and the last colour.
        cmap: name of a colour map.
        labels: of the columns, the rows and the colours.
        missing: what a cell without a value means.
    """
    image = ax.imshow(values, vmin=limits[0], vmax=limits[1], cmap=cmap, aspect="auto")
    ax.set_facecolor(MISSING)
    # Before the sizes of cells are measured: it takes a part of the width.
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label=labels[2])
    below = f"{labels[0]}\n(grey: {missing})"
    ax.set_xlabel(labels[0] if np.isfinite(values).all() else below)
    ax.set_ylabel(labels[1])
    spread_ticks(ax, list(columns))
    _ticks(ax.yaxis, list(rows), _extent(ax)[1] / max(len(rows), 1))
    _write_values(ax, values, limits, cmap)


def _write_values(
    ax: Axes, values: np.ndarray, limits: tuple[float, float], cmap: str
) -> None:
    texts = {at: f"{v:.2f}" for at, v in np.ndenumerate(values) if np.isfinite(v)}
    width, height = (
        size / max(n, 1)
        for size, n in zip(_extent(ax), values.shape[::-1], strict=True)
    )
    longest = max(map(len, texts.values()), default=1)
    size = min(_font(ax), width / (longest * _CHARACTER), height)
    if size < 0.8 * _font(ax):
        return
    middle = (limits[0] + limits[1]) / 2
    for (row, column), text in texts.items():
        value = values[row, column]
        dark = value > 0.6 * limits[1]
        if cmap == DIVERGING:  # Dark at both ends.
            dark = abs(value - middle) > 0.6 * (limits[1] - middle)
        colour = "white" if dark else "black"
        cell = ax.text(column, row, text, color=colour, fontsize=size)
        cell.set(ha="center", va="center")


def spread_ticks(ax: Axes, names: list[Any]) -> None:
    """Name the positions 0, 1, ... of the x-axis, without names over each other."""
    room = _extent(ax)[0] / max(len(names), 1)
    is_wide = max(map(_width, names), default=0) * _font(ax) > room
    if is_wide and not all(isinstance(name, int) for name in names):
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        return
    _ticks(ax.xaxis, names, room / max(map(_width, names), default=1))


def _ticks(axis: Axis, names: list[Any], room: float) -> None:
    """Set ticks; of numbers, only every k-th if there is no room in points for all."""
    every = 1
    if all(isinstance(name, int) for name in names):
        every = max(1, int(np.ceil(_font(axis) / max(room, 1e-9))))
    axis.set_ticks(range(len(names))[::every], names[::every])


def _width(name: Any) -> float:
    """Return the width of a name over the size of the font, with a space after it."""
    return (len(str(name)) + 1) * _CHARACTER


def _extent(ax: Axes) -> tuple[float, float]:
    """Return width and height of the axes in points."""
    box, points = ax.get_window_extent(), 72 / ax.figure.dpi
    return box.width * points, box.height * points


def _font(of: Any) -> float:
    """Return the size of the text of axes in points."""
    axis = getattr(of, "xaxis", of)
    return float(axis.label.get_fontsize())


def _legend_below(ax: Axes) -> None:
    """Move a legend of many entries out of the axes, where it would hide lines."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = ax.get_legend_handles_labels()
    if len(labels) <= 4 or ax.get_legend() is None:
        return
    wide = max(len(label) + 6 for label in labels) * SMALL * _CHARACTER
    below = ScaledTranslation(0, -3.5 * SMALL / 72, ax.figure.dpi_scale_trans)
    ax.legend(
        handles,
        labels,
        fontsize=SMALL,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=ax.transAxes + below,
        ncols=max(1, min(4, int(SIZE[0] * 72 / wide))),
        columnspacing=1.0,
    )


def as_png(plot: Callable[..., Any], *arguments: Any) -> bytes:
    """Return what `plot(*arguments, ax=)` draws, as the content of a PNG file.

    Its size makes the text readable on a phone.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    # Without pyplot, which may open windows and counts figures.
    figure = Figure(figsize=SIZE, dpi=DPI, layout="tight")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    plot(*arguments, ax=ax)
    ax.title.set(fontsize=_font(ax), wrap=True)
    _legend_below(ax)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
