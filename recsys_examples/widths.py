"""The width with which a model has a given number of parameters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_MAX_WIDTH = 1000


def nearest_width(parameters: Callable[[int], int], target: int) -> int:
    """Return the width, from 1 to 999, whose number of parameters is nearest.

    Args:
        parameters: the number of parameters by width, a quadratic function.
        target: the number of parameters wanted.

    Example:

    >>> nearest_width(lambda width: width**2 + 1, 26)
    5
    """
    # Fitted to three points: a count may need a model.
    points = [1, 2, 3]
    quadratic = np.polyfit(points, [parameters(width) for width in points], 2)
    counts = np.polyval(quadratic, np.arange(1, _MAX_WIDTH))
    return 1 + int(np.argmin(np.abs(counts - target)))
