"""Groups of rows, for layers that dispatch by a one-hot matrix of rows and slots."""

from __future__ import annotations

import numpy as np

GROUP = 1024  # The matrix has 1.25 k GROUP numbers a row.


def grouped(rows: np.ndarray) -> np.ndarray:
    """Return rows of shape (n, d) as (groups, `GROUP`, d)."""
    return rows.reshape(-1, min(GROUP, len(rows)), rows.shape[-1])
