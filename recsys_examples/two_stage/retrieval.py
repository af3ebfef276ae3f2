"""The first stage: training of the two towers, and the index of movie vectors.

The towers (towers.py) are trained with a softmax over the whole catalogue (`--stack
keras-rs`), or with in-batch softmax in a `tfrs.Model` (`--stack tfrs`, see
tfrs_stack.py).

Axis letters: b batch, i movies of the catalogue, c candidates, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras_rs
import numpy as np

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.training import Validation, fit_ranker
from recsys_examples.two_stage.settings import Settings
from recsys_examples.two_stage.towers import (
    Index,
    Retrieval,
    candidate_vectors,
    mask_scores,
    query_tower,
    tower_settings,
)


def fit_retrieval(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    *,
    seed: int,
    validation: Validation | None = None,
    epochs: int | None = None,
    verbose: int = 0,
) -> Retrieval:
    """Train the towers with the stack of the settings.

    Args:
        sequences: the training ratings.
        catalogue: all movies.
        settings: the stack and the maximal number of epochs.
        seed: seed of the weights and of shuffling.
        validation: the window for early stopping.
        epochs: number of epochs, if it is not tuned.
        verbose: as in `keras.Model.fit`.
    """
    fit: Callable[..., Retrieval] = _fit_with_keras
    if settings.stack == "tfrs":
        from recsys_examples.two_stage.tfrs_stack import fit_with_tfrs

        fit = fit_with_tfrs
    return fit(sequences, catalogue, settings, seed, validation, epochs, verbose)


def _fit_with_keras(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    seed: int,
    validation: Validation | None,
    epochs: int | None,
    verbose: int,
) -> Retrieval:
    fit = fit_ranker(
        sequences,
        catalogue,
        tower_settings(settings),
        tasks=("watch",),
        seed=seed,
        validation=validation,
        epochs=epochs,
        verbose=verbose,
    )
    towers = fit.ranker.towers["watch"]
    return Retrieval(
        query_tower(towers), candidate_vectors(towers), fit.epochs, fit.curves
    )


class UnseenRetrieval(keras_rs.layers.BruteForceRetrieval):
    """keras-rs' brute-force retrieval of movies that a user has not seen.

    Call arguments:
        inputs: queries (b, d), and (n, 2) positions in the scores (b, i) of the movies
            to exclude.
    """

    def compute_score(self, query_embedding: Any, candidate_embedding: Any) -> Any:
        queries, seen = query_embedding
        return mask_scores(super().compute_score(queries, candidate_embedding), seen)


def make_index(
    candidates: np.ndarray, popularity: np.ndarray, settings: Settings
) -> Index:
    """Return the stack's index of the movies with at least `fewest_ratings` ratings.

    If there are fewer such movies than candidates, the most rated movies are indexed.

    Args:
        candidates: (i, d) vectors of all movies.
        popularity: (i,) number of ratings of each movie.
        settings: the stack, the number of candidates, and `fewest_ratings`.
    """
    eligible = int((popularity >= settings.fewest_ratings).sum())
    size = max(eligible, settings.candidates)
    indexed = np.sort(np.argsort(-popularity, kind="stable")[:size])
    vectors = candidates[indexed]
    if settings.stack == "tfrs":
        from recsys_examples.two_stage.tfrs_stack import UnseenIndex

        find = UnseenIndex(vectors, settings.candidates)
    else:
        find = UnseenRetrieval(vectors, k=settings.candidates)
    return Index(find, indexed, len(candidates))
