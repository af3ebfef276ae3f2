"""The rows on which mixtures are trained: ids, numbers, the labels of two tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TASKS = ("click", "buy")


@dataclass(frozen=True)
class Sizes:
    """Sizes of inputs and models.

    Attributes:
        rows: rows of a batch.
        id_columns, ids, embedding: columns of ids, ids of each, width of their vectors.
        numbers: columns of numbers.
        expert_units, tower_units: units of the layers of an expert and of a tower.
    """

    rows: int = 4096
    id_columns: int = 26
    ids: int = 10_000
    embedding: int = 16
    numbers: int = 13
    expert_units: tuple[int, ...] = (256, 128)
    tower_units: tuple[int, ...] = (64,)

    @property
    def id_names(self) -> list[str]:
        """Names of the columns of ids."""
        return [f"id_{i}" for i in range(self.id_columns)]

    @property
    def number_names(self) -> list[str]:
        """Names of the columns of numbers."""
        return [f"number_{i}" for i in range(self.numbers)]

    @property
    def features(self) -> int:
        """Number of features of a row, d."""
        return self.id_columns * self.embedding + self.numbers


def draw(sizes: Sizes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a batch: columns of shape (rows, 1) by name, and labels by task."""
    rng = np.random.default_rng(0)
    n = sizes.rows
    columns: dict[str, np.ndarray] = {}
    for name in sizes.id_names:
        columns[name] = rng.integers(0, sizes.ids, (n, 1)).astype("int32")
    for name in sizes.number_names:
        columns[name] = rng.normal(size=(n, 1)).astype("float32")
    labels = {task: (rng.random((n, 1)) < 0.2).astype("float32") for task in TASKS}
    return columns, labels
