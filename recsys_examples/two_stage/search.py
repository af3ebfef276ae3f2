"""Approximate search with faiss, where it is installed: an inverted file of vectors.

The index is outside TensorFlow: the SavedModel computes the queries, faiss finds more
movies than needed, those seen are removed, and the SavedModel ranks the rest.

Axis letters: b batch, c candidates, i movies, d dimensions, n movies found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recsys_examples.two_stage.towers import MASKED_SCORE

PROBES = 32  # lists searched per query
_LISTS_PER_ROOT = 2  # number of lists, in square roots of the number of movies
_TRAINING_ROWS_PER_LIST = 64


def is_installed() -> bool:
    """Whether faiss can be imported."""
    return importlib.util.find_spec("faiss") is not None


def write_index(vectors: np.ndarray, file: Path, seed: int = 0) -> None:
    """Train an inverted file on vectors (i, d) and write it."""
    import faiss

    lists = int(_LISTS_PER_ROOT * np.sqrt(len(vectors)))
    rng = np.random.default_rng(seed)
    sample = min(len(vectors), _TRAINING_ROWS_PER_LIST * lists)
    index = faiss.index_factory(
        vectors.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT
    )
    index.train(vectors[rng.choice(len(vectors), sample, replace=False)])
    index.add(vectors)
    faiss.write_index(index, str(file))


def read_index(file: Path, threads: int) -> Callable[[np.ndarray, int], Any]:
    """Return a search: queries (b, d) and n -> scores and rows (b, n), -1 if fewer."""
    import faiss

    index: Any = faiss.read_index(str(file))
    index.nprobe = PROBES
    faiss.omp_set_num_threads(threads)
    return index.search


def remove_seen(
    scores: np.ndarray, rows: np.ndarray, seen: list[np.ndarray], candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first movies that are not seen, as `towers.Index` does.

    Args:
        scores: (b, n) in descending order.
        rows: (b, n) catalogue rows, -1 after the last movie found.
        seen: the catalogue rows that each user has seen.
        candidates: number c of candidates.
    """
    best = np.full((len(rows), candidates), MASKED_SCORE, np.float32)
    kept = np.zeros((len(rows), candidates), np.int32)
    for user, movies in enumerate(seen):
        at = np.flatnonzero((rows[user] >= 0) & ~np.isin(rows[user], movies))
        at = at[:candidates]
        best[user, : len(at)], kept[user, : len(at)] = scores[user, at], rows[user, at]
    return best, kept
