"""One SavedModel of the whole pipeline.

Signatures, both of which exclude the movies that the user has seen:
    recommend        ids of users known at export -> their lists
    serving_default  raw features of any user, see `Sequences.histories` -> lists

`keras_moe.export.load` calls either; its errors name the invalid feature.

The movie vectors and statistics are constants of the graph: a call computes the user
tower, the product with the catalogue, and the scores of the candidates.

Axis letters: b batch, l history length, c candidates, k places of the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_moe
from recsys_examples.movielens.features import HISTORY_LENGTH, NO_MOVIE
from recsys_examples.movielens.serving import HIGHEST_RATING, KnownUsers, check_stars
from recsys_examples.two_stage.first_stage import FirstStage
from recsys_examples.two_stage.fusion import Fusion, diverse_top, fuse
from recsys_examples.two_stage.settings import LIST_LENGTH, TASKS
from recsys_examples.two_stage.towers import MASKED_SCORE


class Recommender(keras.layers.Layer):
    """Both stages and the fusion: features of users -> lists.

    Args:
        stage: the first stage.
        ranker: the second stage.
        fusion: weights of the score fusion.
    """

    def __init__(self, stage: FirstStage, ranker: keras.Model, fusion: Fusion) -> None:
        super().__init__()
        self._query, self._pairs = stage.retrieval.query, stage.pairs
        self._index, self._ranker, self._fusion = stage.index, ranker, fusion
        self._users = KnownUsers(stage.past, stage.catalogue)
        self._movie_ids = tf.constant(stage.catalogue.movie_ids)
        self._titles = tf.constant(stage.catalogue.titles)

    def recommend(self, user_id: Any) -> dict[str, Any]:
        """Return the lists of users (b,). Unknown users get the list of a new user."""
        features, seen, known = self._users(user_id)
        return {**self(features, seen), "known_user": known}

    def recommend_for(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the lists for raw features. Movies of the history are excluded."""
        features = check_stars(features)
        # Unknown movies count as padding in both stages.
        known = self._pairs.is_known(features["history"])
        features["history"] = tf.where(
            known, features["history"], tf.cast(NO_MOVIE, tf.int64)
        )
        features["history_ratings"] = tf.where(known, features["history_ratings"], 0.0)
        return self(features, self._pairs.rows_seen(features["history"]))

    def call(self, features: dict[str, Any], seen: Any) -> dict[str, Any]:
        queries = self._query(features, training=False)
        return self.rank(features, *self._index((queries, seen)))

    def retrieve(self, user_id: Any) -> dict[str, Any]:
        """Return the candidates of known users (b, c): scores `first` and `rows`."""
        features, seen, _ = self._users(user_id)
        queries = self._query(features, training=False)
        return dict(zip(("first", "rows"), self._index((queries, seen)), strict=True))

    def queries(self, user_id: Any) -> dict[str, Any]:
        """Return the queries (b, d) of known users, for an index outside the model."""
        features, _, _ = self._users(user_id)
        return {"queries": self._query(features, training=False)}

    def recommend_among(self, user_id: Any, first: Any, rows: Any) -> dict[str, Any]:
        """Return the lists of users (b,) from candidates found by another index.

        Args:
            user_id: (b,) ids.
            first: (b, c) scores of the first stage, in descending order.
            rows: (b, c) catalogue rows of the candidates.
        """
        return self.rank(self._users(user_id)[0], first, rows)

    def rank(self, features: dict[str, Any], first: Any, rows: Any) -> dict[str, Any]:
        """Return the lists of the second stage, from the candidates of the first."""
        pairs = self._pairs(features, rows, first)
        scores = self._ranker(list(pairs), training=False)
        scores = {task: tf.reshape(scores[task], tf.shape(rows)) for task in TASKS}
        unseen = first > MASKED_SCORE / 2
        fused = tf.where(unseen, fuse(scores, self._fusion), MASKED_SCORE)
        top = diverse_top(
            fused,
            rows,
            self._pairs.genres,
            LIST_LENGTH,
            self._fusion.diversity,
        )

        def listed(values: Any) -> Any:
            return tf.gather(values, top, batch_dims=1)

        rows, unseen = listed(rows), listed(unseen)
        # If fewer than LIST_LENGTH movies are unseen, the list is padded with blanks.
        return {
            "movie_id": tf.where(
                unseen, tf.gather(self._movie_ids, rows), tf.cast(NO_MOVIE, tf.int64)
            ),
            "title": tf.where(unseen, tf.gather(self._titles, rows), ""),
            "score": listed(fused),
            "watch": tf.where(unseen, tf.sigmoid(listed(scores["watch"])), 0.0),
            "like": tf.where(unseen, tf.sigmoid(listed(scores["like"])), 0.0),
            "rating": tf.where(unseen, _stars(listed(scores["rating"])), 0.0),
        }


def _stars(ratings: Any) -> Any:
    return tf.clip_by_value(ratings, 0.5, HIGHEST_RATING)


def export_saved_model(
    stage: FirstStage, ranker: keras.Model, fusion: Fusion, folder: Path
) -> None:
    """Write a SavedModel that requires only TensorFlow."""
    recommender = Recommender(stage, ranker, fusion)
    recommender.recommend(tf.constant([0], tf.int64))  # Keras exports built layers
    archive = keras.export.ExportArchive()
    archive.track(recommender)
    archive.add_endpoint(
        "recommend",
        recommender.recommend,
        [tf.TensorSpec((None,), tf.int64, "user_id")],
    )
    history = (None, HISTORY_LENGTH)
    features = {
        "user_id": tf.TensorSpec((None,), tf.int64, "user_id"),
        "history": tf.TensorSpec(history, tf.int64, "history"),
        "history_ratings": tf.TensorSpec(history, tf.float32, "history_ratings"),
        "last_seen": tf.TensorSpec((None,), tf.int64, "last_seen"),
    }
    archive.add_endpoint("serving_default", recommender.recommend_for, [features])
    archive.write_out(folder, verbose=False)
    keras_moe.export.write_checksums(folder)


def export_stages(recommender: Recommender, folder: Path, candidates: int) -> None:
    """Write a SavedModel of both stages, and of each one for an index outside of it.

    The signatures are `recommend`, `retrieve`, `queries` and `recommend_among`, see
    `Recommender`.
    """
    recommender.recommend(tf.constant([0], tf.int64))
    archive = keras.export.ExportArchive()
    archive.track(recommender)
    users = tf.TensorSpec((None,), tf.int64, "user_id")
    found = [
        tf.TensorSpec((None, candidates), tf.float32, "first"),
        tf.TensorSpec((None, candidates), tf.int32, "rows"),
    ]
    archive.add_endpoint("recommend", recommender.recommend, [users])
    archive.add_endpoint("retrieve", recommender.retrieve, [users])
    archive.add_endpoint("queries", recommender.queries, [users])
    archive.add_endpoint(
        "recommend_among", recommender.recommend_among, [users, *found]
    )
    archive.write_out(folder, verbose=False)
