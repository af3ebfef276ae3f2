"""The work of optimizers of tables: sizes of the model, and batches with new ids."""

from __future__ import annotations

import numpy as np

WIDTH, HIDDEN, BATCH = 16, 64, 1024
BATCHES = 64  # With fewer, the rows of all batches would stay in the caches.


def draw(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids below `rows` and labels of `BATCHES` batches.

    Returns:
        Arrays of shape (BATCHES * BATCH, columns) and (BATCHES * BATCH, 1).
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, rows, (BATCHES * BATCH, columns)).astype("int32")
    return ids, rng.random((BATCHES * BATCH, 1)).astype("float32")
