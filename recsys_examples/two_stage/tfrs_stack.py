"""The first stage by tensorflow-recommenders: a `tfrs.Model` and its index.

The towers are the same Keras 3 towers, as layers of Keras 2 (`keras_moe.tfrs`). Their
loss is tfrs' own: a softmax over the batch's movies, corrected for how often a movie is
drawn, without movies that are another row's by accident.

Import this module before anything uses `tf.keras`, see `keras_moe.tfrs`.

Axis letters: b batch, i movies of the catalogue, c candidates, d dimensions.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from keras_moe.tfrs import LegacyLayer, tf_keras

# tensorflow-recommenders looks at tf.keras when it is imported, so it comes second.
# isort: split
import keras
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.labels import Examples
from recsys_examples.movielens.model import Towers, build_ranker
from recsys_examples.movielens.training import Validation
from recsys_examples.two_stage.settings import Settings
from recsys_examples.two_stage.towers import (
    Retrieval,
    candidate_vectors,
    query_tower,
    tower_settings,
    without,
)

_KS = (10, 100)
_CHOSEN_BY = "val_factorized_top_k/top_100_categorical_accuracy"


class MovieTower(keras.layers.Layer):
    """(b,) catalogue rows -> (b, d), the bias last."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self._movies = towers.movies

    def call(self, rows: Any) -> Any:
        vectors, biases = self._movies.all_movies()
        return tf.gather(tf.concat([vectors, biases[:, None]], 1), rows)


class TwoTowers(tfrs.Model):
    """Users at a moment, and the movies that they watched next.

    A batch is (features (b,), movies watched next (b, n), whether there is one (b, n)).

    Args:
        towers: the two sides, in Keras 3.
        shares: (i,) how often each movie is drawn as another row's.
    """

    def __init__(self, towers: Towers, shares: np.ndarray) -> None:
        super().__init__()
        self.query = LegacyLayer(query_tower(towers), name="query")
        self.movie = LegacyLayer(MovieTower(towers), name="movie")
        self._shares = tf.constant(shares, tf.float32)
        # A dataset computes the vectors when they are asked for, so they are new.
        rows = tf.data.Dataset.range(len(shares), output_type=tf.int32)
        vectors = rows.batch(len(shares)).map(self.movie)
        self.task = tfrs.tasks.Retrieval(
            metrics=tfrs.metrics.FactorizedTopK(vectors, ks=_KS),
            remove_accidental_hits=True,
        )

    def compute_loss(self, inputs: Any, training: bool = False) -> Any:
        features, next_movies, watched = inputs
        queries = self.query(features, training=training)
        rows = tf.boolean_mask(next_movies, watched)
        users = tf.cast(tf.where(watched)[:, 0], tf.int32)
        # What the same user watched too is no counterexample.
        others = users[:, None] != users[None]
        loss = self.task(
            tf.gather(queries, users),
            self.movie(rows, training=training),
            candidate_sampling_probability=tf.gather(self._shares, rows),
            candidate_ids=rows,
            compute_metrics=not training,
            score_mask=others | tf.eye(tf.shape(rows)[0], dtype=tf.bool),
        )
        return loss / tf.cast(tf.shape(rows)[0], loss.dtype)


class _Batches(tf_keras.utils.Sequence):
    """The first example's `Examples`, as `TwoTowers` takes them."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Any, Any]:
        features, _, weights = self._examples[index]
        next_movies = features.pop("next_movies")
        return features, next_movies, weights["like"] > 0

    def on_epoch_end(self) -> None:
        self._examples.on_epoch_end()


def fit_with_tfrs(
    sequences: Sequences,
    catalogue: Catalogue,
    settings: Settings,
    seed: int,
    validation: Validation | None,
    epochs: int | None,
    verbose: int,
) -> Retrieval:
    """Train the towers in a `tfrs.Model`; see `retrieval.fit_retrieval`."""
    keras.utils.set_random_seed(seed)
    sizes = tower_settings(settings)
    drawn = np.bincount(sequences.movies, minlength=len(catalogue))
    ranker = build_ranker(catalogue, sequences.user_ids, drawn, sizes, ("watch",))
    towers = ranker.towers["watch"]
    model = TwoTowers(towers, (drawn + 1) / (drawn + 1).sum())

    def batches(past: Sequences, known: np.ndarray | None = None) -> _Batches:
        return _Batches(Examples(past, catalogue, sizes, seed=seed, known=known))

    examples = batches(sequences)
    schedule = tf_keras.optimizers.schedules.CosineDecay(
        sizes.learning_rate, sizes.max_epochs * len(examples), alpha=0.05
    )
    model.compile(optimizer=tf_keras.optimizers.Adam(schedule))
    watched: dict[str, Any] = {}
    if validation is not None:
        watched["validation_data"] = batches(validation.sequences, sequences.lengths)
        watched["callbacks"] = [
            tf_keras.callbacks.EarlyStopping(
                _CHOSEN_BY, mode="max", patience=2, restore_best_weights=True
            ),
        ]
    history = model.fit(
        examples, epochs=epochs or sizes.max_epochs, verbose=verbose, **watched
    ).history
    curves = {name: [float(v) for v in values] for name, values in history.items()}
    best = int(np.argmax(curves[_CHOSEN_BY])) + 1 if validation else len(curves["loss"])
    return Retrieval(query_tower(towers), candidate_vectors(towers), best, curves)


class UnseenIndex(keras.layers.Layer):
    """tfrs' index, of movies that a user has not seen.

    It is asked for as many more movies as a user of the batch has seen, so that enough
    are left. ScaNN, where it is installed, finds most of the best ones; else brute
    force finds all.

    Args:
        candidates: (i, d) the movies' vectors.
        k: number of candidates c.

    Call arguments:
        inputs: the queries (b, d), and (n, 2) places among (b, i) of movies that are
            no candidates.

    Returns:
        scores and catalogue rows (b, c), as `UnseenRetrieval`.
    """

    def __init__(self, candidates: np.ndarray, k: int) -> None:
        super().__init__()
        self._k, self._num_movies = k, len(candidates)
        kind = tfrs.layers.factorized_top_k
        exact = not _scann_is_installed()
        made = kind.BruteForce(k=k) if exact else kind.ScaNN(k=k)
        self.index = made.index(tf.constant(candidates))

    def call(self, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        queries, seen = inputs
        batch = tf.shape(queries)[0]
        counts = tf.math.bincount(tf.cast(seen[:, 0], tf.int32), minlength=batch)
        most = tf.reduce_max(tf.concat([counts, [0]], 0))
        wanted = tf.minimum(self._k + most, self._num_movies)
        scores, rows = self.index(queries, k=wanted)
        hidden = without(tf.zeros((batch, self._num_movies)), seen)
        scores += tf.gather(hidden, rows, batch_dims=1)
        best, places = tf.math.top_k(scores, self._k)
        return best, tf.gather(rows, places, batch_dims=1)


def _scann_is_installed() -> bool:
    return importlib.util.find_spec("scann") is not None
