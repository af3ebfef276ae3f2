"""The style of the examples' own figures: that of `keras_moe.plots`."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

from keras_moe.plots import _style

REFERENCE: dict[str, Any] = {"color": "grey", "linewidth": 0.8}  # what is compared
_MARKERS = "osD^vPX"


def line(i: int) -> dict[str, Any]:
    """Return colour and line style of the i-th line; they differ also in print."""
    return _style.line(i)


def marked(i: int) -> dict[str, Any]:
    """Return them and the marker of its points."""
    return {**line(i), "marker": _MARKERS[i % len(_MARKERS)]}
