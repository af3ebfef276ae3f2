"""The Census-Income rows as arrays that every environment can read, and the AUC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

TASKS = ("income", "never_married")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models and of training."""

    embedding: int = 8
    experts: int = 8
    expert_units: tuple[int, ...] = (64, 32)
    tower_units: tuple[int, ...] = (16,)
    rows: int = 1024  # of a batch


@dataclass(frozen=True)
class Rows:
    """Encoded rows.

    Attributes:
        columns: (n, 1) arrays by name: ids, int32, then numbers, float32.
        labels: (n, 1) float32 by task.
    """

    columns: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class CensusRows:
    """Training and test rows.

    Attributes:
        train, test: the rows.
        ids: number of ids of each column of ids, by name.
        numbers: names of the columns of numbers.
    """

    train: Rows
    test: Rows
    ids: dict[str, int]
    numbers: list[str]


def prepare(path: Path, rows: int | None) -> str:
    """Write the arrays, unless they are there.

    Args:
        path: the file.
        rows: number of training rows to keep; None: all.

    Returns:
        "", or why there are no arrays.
    """
    if path.exists():
        return ""
    # Imported here: workers import this module without pandas.
    from recsys_examples.census_income.data import load_census
    from recsys_examples.census_income.features import make_splits
    from recsys_examples.errors import InputError

    try:
        splits = make_splits(load_census())
    except InputError as error:
        return str(error)
    starts = splits.train.codes.min(axis=0)
    arrays = {"sizes": np.diff(np.append(starts, splits.table_rows))}
    for name, part in (("train", splits.train), ("test", splits.test)):
        kept = slice(rows if name == "train" else None)
        arrays[f"{name}_ids"] = part.codes[kept] - starts
        arrays[f"{name}_numbers"] = part.numbers[kept]
        labels = np.stack([part.labels[task] for task in TASKS], axis=1)
        arrays[f"{name}_labels"] = labels[kept]
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.stem}-partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)
    return ""


def load(path: str) -> CensusRows:
    """Return the arrays that `prepare` wrote."""
    with np.load(path) as arrays:
        sizes = arrays["sizes"]
        ids = {f"id_{i}": int(size) for i, size in enumerate(sizes)}
        width = arrays["train_numbers"].shape[1]
        numbers = [f"number_{i}" for i in range(width)]
        parts = []
        for part in ("train", "test"):
            values = (arrays[f"{part}_{kind}"] for kind in ("ids", "numbers", "labels"))
            found_ids, found_numbers, labels = values
            columns = dict(zip(ids, _columns(found_ids, "int32"), strict=True))
            columns |= zip(numbers, _columns(found_numbers, "float32"), strict=True)
            by_task = dict(zip(TASKS, _columns(labels, "float32"), strict=True))
            parts.append(Rows(columns, by_task))
    return CensusRows(*parts, ids, numbers)


def _columns(values: np.ndarray, dtype: str) -> list[np.ndarray]:
    return [np.ascontiguousarray(x[:, None], dtype) for x in values.T]


def aucs(rows: Rows, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the exact AUC of each task, named for a table."""
    return {
        f"AUC, {task}": auc(rows.labels[task].ravel(), scores[task].ravel())
        for task in TASKS
    }


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the probability that a positive row scores above a negative one.

    Args:
        labels: (n,), 0 or 1, both present.
        scores: (n,); a tie counts one half.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # Of ties: their mean.
    positive = labels > 0.5
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))
