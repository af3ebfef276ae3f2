"""The first stage: training of the two towers, and the index of movie vectors.

The towers (towers.py) are trained with a softmax over the whole catalogue (`--stack
keras-rs`), or with in-batch softmax in a `tfrs.Model` (`--stack tfrs`, see
tfrs_stack.py).

Axis letters: b batch, i movies of the catalogue, c candidates, d dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_rs
import numpy as np
import tensorflow as tf

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

_GROUP = 16  # scores of a group of `best_scores`
_LARGE = 256  # it groups from so many times k scores


def fit_retrieval(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    *,
    seed: int,
    validation: Validation | None = None,
    epochs: int | None = None,
    verbose: int = 0,
    backup: Path | None = None,
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
        backup: folder of backups, from which an interrupted fit goes on. The stack
            "tfrs" has none and starts again.
    """
    given = (sequences, catalogue, settings, seed, validation, epochs, verbose)
    if settings.stack == "tfrs":
        from recsys_examples.two_stage.tfrs_stack import fit_with_tfrs

        return fit_with_tfrs(*given)
    return _fit_with_keras(*given, backup)


def _fit_with_keras(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    seed: int,
    validation: Validation | None,
    epochs: int | None,
    verbose: int,
    backup: Path | None,
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
        backup=backup,
    )
    towers = fit.ranker.towers["watch"]
    return Retrieval(
        query_tower(towers), candidate_vectors(towers), fit.epochs, fit.curves
    )


class UnseenRetrieval(keras_rs.layers.BruteForceRetrieval):
    """keras-rs' brute-force retrieval of movies that a user has not seen.

    It stores the vectors as columns (d, i) and selects by `best_scores`, both of which
    are faster on CPUs.

    Call arguments:
        inputs: queries (b, d), and (n, 2) positions in the scores (b, i) of the movies
            to exclude.
    """

    candidate_embeddings: Any

    def update_candidates(
        self, candidate_embeddings: Any, candidate_ids: Any = None
    ) -> None:
        self._validate_candidate_embeddings_and_ids(candidate_embeddings, candidate_ids)
        columns = np.ascontiguousarray(np.transpose(candidate_embeddings))
        if self.candidate_embeddings is None:
            self.candidate_embeddings = keras.Variable(columns, trainable=False)
        else:
            self.candidate_embeddings.assign(columns)
        self.built = True

    def call(self, inputs: Any) -> tuple[Any, Any]:
        queries, seen = inputs
        scores = tf.matmul(queries, self.candidate_embeddings.value)
        return best_scores(mask_scores(scores, seen), self.k)


def best_scores(scores: Any, k: int) -> tuple[Any, Any]:
    """Return the k best scores (b, k) in descending order, and their positions.

    As `tf.math.top_k`, but for a large i first over the maxima of groups: the k best
    scores are in the k groups with the best maxima. Among equal scores, the positions
    may differ.

    Args:
        scores: (b, i).
        k: number of scores.
    """
    size = scores.shape[1] or 0
    if size < _LARGE * k:
        return tf.math.top_k(scores, k)
    batch, count = tf.shape(scores)[0], size // _GROUP
    whole = scores if size == count * _GROUP else scores[:, : count * _GROUP]
    groups = tf.reshape(whole, (batch * count, _GROUP))
    maxima = tf.reshape(tf.reduce_max(groups, axis=1), (batch, count))
    chosen = tf.math.top_k(maxima, k, sorted=False).indices  # (b, k)
    kept = tf.gather(groups, chosen + count * tf.range(batch)[:, None])
    places = _GROUP * chosen[..., None] + tf.range(_GROUP)  # (b, k, group)
    rest = tf.broadcast_to(
        tf.range(count * _GROUP, size), (batch, size - count * _GROUP)
    )
    kept = tf.concat(
        [tf.reshape(kept, (batch, k * _GROUP)), scores[:, count * _GROUP :]], axis=1
    )
    places = tf.concat([tf.reshape(places, (batch, k * _GROUP)), rest], axis=1)
    best, at = tf.math.top_k(kept, k)
    return best, tf.gather(places, at, batch_dims=1)


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
