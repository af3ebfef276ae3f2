"""The first stage with tensorflow-recommenders: a `tfrs.Model` and its index.

The towers are the same Keras 3 towers, wrapped as layers of Keras 2 (`keras_moe.tfrs`).
The loss is that of tfrs: in-batch softmax with sampling-bias correction, and without
accidental hits.

Import this module before anything uses `tf.keras`, see `keras_moe.tfrs`.

Axis letters: b batch, i movies of the catalogue, c candidates, d dimensions.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from keras_moe.tfrs import LegacyLayer, tf_keras

# tensorflow-recommenders uses tf.keras at import and must be imported after tf_keras.
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
    mask_scores,
    query_tower,
    tower_settings,
)

_KS = (10, 100)
_MONITORED = "val_factorized_top_k/top_100_categorical_accuracy"


class MovieTower(keras.layers.Layer):
    """(b,) catalogue rows -> (b, d), with the bias as the last dimension."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self._movies = towers.movies

    def call(self, rows: Any) -> Any:
        vectors, biases = self._movies.all_movies()
        return tf.gather(tf.concat([vectors, biases[:, None]], 1), rows)


class TwoTowers(tfrs.Model):
    """Retrieval of the movies that users watch next.

    A batch is (features (b,), next movies (b, n), mask of the next movies (b, n)).

    Args:
        towers: the two towers, in Keras 3.
        shares: (i,) sampling probability of each movie as an in-batch negative.
    """

    def __init__(self, towers: Towers, shares: np.ndarray) -> None:
        super().__init__()
        self.query = LegacyLayer(query_tower(towers), name="query")
        self.movie = LegacyLayer(MovieTower(towers), name="movie")
        self._shares = tf.constant(shares, tf.float32)
        # A dataset: the vectors are computed with the current weights when it is read.
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
        # Other movies that the same user watched are not negatives.
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
    """The MovieLens example's `Examples`, in the format of `TwoTowers`."""

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
    counts = np.bincount(sequences.movies, minlength=len(catalogue))
    ranker = build_ranker(catalogue, sequences.user_ids, counts, sizes, ("watch",))
    towers = ranker.towers["watch"]
    model = TwoTowers(towers, (counts + 1) / (counts + 1).sum())

    def batches(past: Sequences, known: np.ndarray | None = None) -> _Batches:
        return _Batches(Examples(past, catalogue, sizes, seed=seed, known=known))

    examples = batches(sequences)
    schedule = tf_keras.optimizers.schedules.CosineDecay(
        sizes.learning_rate, sizes.max_epochs * len(examples), alpha=0.05
    )
    model.compile(optimizer=tf_keras.optimizers.Adam(schedule))
    early_stopping: dict[str, Any] = {}
    if validation is not None:
        early_stopping["validation_data"] = batches(
            validation.sequences, sequences.lengths
        )
        early_stopping["callbacks"] = [
            tf_keras.callbacks.EarlyStopping(
                _MONITORED, mode="max", patience=2, restore_best_weights=True
            ),
        ]
    history = model.fit(
        examples, epochs=epochs or sizes.max_epochs, verbose=verbose, **early_stopping
    ).history
    curves = {name: [float(v) for v in values] for name, values in history.items()}
    best = int(np.argmax(curves[_MONITORED])) + 1 if validation else len(curves["loss"])
    return Retrieval(query_tower(towers), candidate_vectors(towers), best, curves)


class UnseenIndex(keras.layers.Layer):
    """tfrs' index, for movies that a user has not seen.

    It retrieves k plus the largest number of movies seen by a user of the batch, and
    masks those seen. ScaNN (approximate) is used if installed, else brute force.

    Args:
        candidates: (i, d) vectors of the movies.
        k: number of candidates c.

    Call arguments:
        inputs: queries (b, d), and (n, 2) positions in the scores (b, i) of the movies
            to exclude.

    Returns:
        Scores and catalogue rows (b, c), as `UnseenRetrieval`.
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
        hidden = mask_scores(tf.zeros((batch, self._num_movies)), seen)
        scores += tf.gather(hidden, rows, batch_dims=1)
        best, places = tf.math.top_k(scores, self._k)
        return best, tf.gather(rows, places, batch_dims=1)


def _scann_is_installed() -> bool:
    return importlib.util.find_spec("scann") is not None
