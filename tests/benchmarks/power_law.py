"""How a cost grows: the exponent of a power law, fitted on logarithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """cost = constant * size^exponent."""

    exponent: float
    standard_error: float


def fit(costs: Mapping[float, float]) -> PowerLaw:
    """Return the exponent by least squares on log cost and log size.

    Args:
        costs: cost by size, at least three sizes.

    Raises:
        ValueError: if there are fewer sizes.

    Example: cost = 3 size^2 is fitted without error.

    >>> fit({1: 3.0, 2: 12.0, 4: 48.0}).exponent
    2.0
    """
    if len(costs) < 3:
        raise ValueError(f"costs must have at least 3 sizes; got {len(costs)}")
    x = np.log(np.fromiter(costs, "float64"))
    y = np.log(np.fromiter(costs.values(), "float64"))
    x -= x.mean()
    exponent = (x @ y) / (x @ x)
    residuals = y - y.mean() - exponent * x
    variance = residuals @ residuals / (len(x) - 2)
    return PowerLaw(round(float(exponent), 12), float(np.sqrt(variance / (x @ x))))
