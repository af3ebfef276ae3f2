"""The style of the examples' own figures: that of `keras_moe.plots`."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

from keras_moe.plots import _style

# The style of a line with which others are compared.
REFERENCE: dict[str, Any] = {"color": "grey", "linewidth": 0.8}
_MARKERS = "osD^vPX"


def line(i: int) -> dict[str, Any]:
    """Return colour and line style of the i-th line."""
    return _style.line(i)


def marked(i: int) -> dict[str, Any]:
    """Return the style of `line(i)`, with a marker."""
    return {**line(i), "marker": _MARKERS[i % len(_MARKERS)]}
