"""The MovieLens example's model on a catalogue of any size, for the comparison.

    scores_t = <[u_t, one-hot of t, level_t], [v, biases of all tasks, 1]>

The movie vectors are computed before the export, not in each call as in the example's
own SavedModel, and the stars are computed for the movies of the list only: the best
that ranking the whole catalogue can do with this model. The results are the same.

Axis letters: b batch, i movies, t tasks, d dimensions, k length of the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.fusion import fuse
from recsys_examples.movielens.model import TASKS, Ranker
from recsys_examples.movielens.serving import KnownUsers
from recsys_examples.two_stage.growth import grow_vectors
from recsys_examples.two_stage.retrieval import best_scores
from recsys_examples.two_stage.settings import LIST_LENGTH
from recsys_examples.two_stage.towers import mask_scores

RANKED_BY = ("watch", "like")  # the tasks of `movielens.fusion.fuse`


class FullCatalogue(keras.layers.Layer):
    """Ranks a grown catalogue with the MovieLens example's model.

    Args:
        ranker: the trained models.
        past: the ratings of the users.
        catalogue: the grown catalogue.
        parents: (i,) see `growth.draw_parents`.
        rng: random generator.

    Call arguments:
        user_id: (b,) ids.

    Returns:
        `movie_id`, `score`, `watch`, `like` (uncalibrated) and `rating`, (b, k) each.
    """

    def __init__(
        self,
        ranker: Ranker,
        past: Sequences,
        catalogue: Catalogue,
        parents: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        self._users = KnownUsers(past, catalogue)
        self._queries = _query_model(ranker)
        vectors = grow_vectors(_movie_vectors(ranker), parents, rng)
        self._columns = keras.Variable(
            np.ascontiguousarray(vectors.T), trainable=False, name="columns"
        )
        self._movie_ids = tf.constant(catalogue.movie_ids)

    def call(self, user_id: Any) -> dict[str, Any]:
        features, seen, _ = self._users(user_id)
        queries = self._queries(features, training=False)
        columns = self._columns.value
        stacked = tf.concat([queries[task] for task in RANKED_BY], axis=0)
        scores = tf.split(tf.matmul(stacked, columns), len(RANKED_BY))
        ranking = fuse(dict(zip(RANKED_BY, scores, strict=True)))
        best, rows = best_scores(mask_scores(ranking, seen), LIST_LENGTH)
        listed = tf.gather(columns, rows, axis=1)  # (d, b, k)
        return {
            "movie_id": tf.gather(self._movie_ids, rows),
            "score": best,
            **{t: tf.einsum("bd,dbk->bk", queries[t], listed) for t in TASKS},
        }


def export_full_catalogue(model: FullCatalogue, folder: Path) -> None:
    """Write a SavedModel with the signature `recommend` of user ids."""
    model(tf.constant([0], tf.int64))
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None,), tf.int64, "user_id")]
    archive.add_endpoint("recommend", model.__call__, signature)
    archive.write_out(folder, verbose=False)


def _query_model(ranker: Ranker) -> keras.Model:
    """Return a model from features of users to the queries of the tasks (b, d)."""
    queries = {}
    for n, task in enumerate(TASKS):
        users = ranker.towers[task].users.output
        level = ranker.catalogue.get_layer(f"level_{task}").output
        hot = ops.one_hot(n * ops.ones_like(level[:, 0], dtype="int32"), len(TASKS))
        queries[task] = ops.concatenate([users, hot, level], axis=-1)
    return keras.Model(ranker.catalogue.input, queries)


def _movie_vectors(ranker: Ranker) -> np.ndarray:
    """Return the vectors, the biases of the tasks, and 1: (movies of the data, d)."""
    known = [ranker.towers[task].movies.all_movies() for task in TASKS]
    vectors = ops.convert_to_numpy(known[0][0])
    biases = np.stack([ops.convert_to_numpy(bias) for _, bias in known], axis=1)
    return np.concatenate([vectors, biases, np.ones_like(biases[:, :1])], axis=1)
