"""The part of the SavedModel that explains: the experts behind each movie.

Signatures:
    explain          user ids and k -> what `recommend` returns, and the explanation
    explain_history  a newcomer's rated movies and k -> the same
    experts          nothing -> what each expert stands for (`profiles.Profile`)
    movies           nothing -> the most rated movies, for a newcomer to choose from

A body without experts has `experts` and `movies` alone.

Axis letters: b batch, l history length, t tasks, e experts, i movies, k length of a
list, c columns.
"""

from __future__ import annotations

from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from recsys_examples.movielens.experts import Contributions
from recsys_examples.movielens.features import (
    HISTORY_LENGTH,
    NO_MOVIE,
    Catalogue,
    Sequences,
)
from recsys_examples.movielens.model import Ranker
from recsys_examples.movielens.movies import FIRST_MOVIE
from recsys_examples.movielens.profiles import KINDS, Profile, profile_experts

NUM_POPULAR = 200


class Recommender(Protocol):
    """`serving.Recommender`, whose functions return a `serving.Ranked`."""

    rank: Any
    rank_users: Any


class Explainer(keras.layers.Layer):
    """Lists of movies with the experts behind each.

    Args:
        recommender: ranks the catalogue.
        ranker: the trained models.
        sequences: ratings of all users at export; a newcomer's ratings are as late as
            the latest of them.
        catalogue: all movies.

    Returns:
        Of `call` and `for_histories`: what `recommend` returns; `year` and `genres`
        (b, k), 0 and "" in blanks; and as `experts.Contributions` defines them,
        `gate_weights` (b, t, e), `contributions` (b, k, t, e) and `mean_contributions`
        (b, t, e).
    """

    def __init__(
        self,
        recommender: Recommender,
        ranker: Ranker,
        sequences: Sequences,
        catalogue: Catalogue,
    ) -> None:
        super().__init__()
        self._recommender, self._contributions = recommender, Contributions(ranker)
        self._lookup = ranker.pairs.get_layer("movie_lookup")
        self._years = tf.constant(catalogue.years.astype("int32"))
        # Few combinations of genres are the genres of all movies.
        names, combination = np.unique(_genre_names(catalogue), return_inverse=True)
        self._genres = tf.constant(names)
        self._combination = tf.constant(combination.astype("int32"))
        users = np.flatnonzero(sequences.lengths)
        last = sequences.histories(catalogue, users)["last_seen"]
        self._latest = int(last.max(initial=0))

    def call(self, user_id: Any, k: Any) -> dict[str, Any]:
        """(b,) user ids and k -> the lists, explained."""
        return self._explained(self._recommender.rank_users(user_id, k))

    def for_histories(
        self, history: Any, history_ratings: Any, k: Any
    ) -> dict[str, Any]:
        """(b, l) movie ids and stars, the latest first, and k -> the lists, explained.

        Histories are padded by zeros. Their movies are excluded from the lists. Ids
        that are not in the catalogue are False in `known_movie` (b, l), as padding is.
        """
        none = tf.zeros_like(history[:, 0])
        watched = tf.reduce_any(history != NO_MOVIE, axis=1)
        features = {
            "user_id": none,
            "history": history,
            "history_ratings": history_ratings,
            "last_seen": tf.where(watched, tf.cast(self._latest, tf.int64), none),
        }
        rows = tf.cast(self._lookup(history), tf.int32) - FIRST_MOVIE
        at = tf.cast(tf.where(rows >= 0), tf.int32)
        seen = tf.stack([at[:, 0], tf.gather_nd(rows, at)], axis=1)
        ranked = self._recommender.rank(features, seen, k)
        unknown = tf.zeros_like(none, tf.bool)
        explained = self._explained(ranked)
        return {**explained, "known_user": unknown, "known_movie": rows >= 0}

    def _explained(self, ranked: Any) -> dict[str, Any]:
        gates, contributions, means = self._contributions(*ranked[1:])
        listed = ranked.lists["movie_id"] != NO_MOVIE
        genres = tf.gather(self._genres, tf.gather(self._combination, ranked.movies))
        return {
            **ranked.lists,
            "year": tf.where(listed, tf.gather(self._years, ranked.movies), 0),
            "genres": tf.where(listed, genres, ""),
            "gate_weights": gates,
            "contributions": tf.where(
                listed[:, :, None, None], contributions, tf.zeros_like(contributions)
            ),
            "mean_contributions": means,
        }


def add_signatures(
    archive: keras.export.ExportArchive,
    recommender: Recommender,
    check_stars: Any,
    ranker: Ranker,
    sequences: Sequences,
    catalogue: Catalogue,
) -> None:
    """Add the signatures of this module to a SavedModel that will be written.

    Args:
        archive: what will be written.
        recommender: ranks the catalogue.
        check_stars: asserts that the `history_ratings` of features are stars.
        ranker: the trained models.
        sequences: ratings of all users at export.
        catalogue: all movies.
    """
    profile = profile_experts(ranker, sequences, catalogue)
    _add_constants(archive, "experts", _as_arrays(profile))
    _add_constants(archive, "movies", _popular(sequences, catalogue))
    if not profile.num_experts:
        return
    explainer = Explainer(recommender, ranker, sequences, catalogue)
    explainer(tf.constant([0], tf.int64), tf.constant(1))  # builds it for export
    archive.track(explainer)
    history = {
        "history": tf.TensorSpec((None, HISTORY_LENGTH), tf.int64, "history"),
        "history_ratings": tf.TensorSpec(
            (None, HISTORY_LENGTH), tf.float32, "history_ratings"
        ),
    }
    k = tf.TensorSpec((), tf.int32, "k")

    def explain_history(history: dict[str, Any], k: Any) -> dict[str, Any]:
        return explainer.for_histories(**check_stars(history), k=k)

    archive.add_endpoint(
        "explain",
        explainer.__call__,
        [tf.TensorSpec((None,), tf.int64, "user_id"), k],
    )
    archive.add_endpoint("explain_history", explain_history, [history, k])


def _add_constants(
    archive: keras.export.ExportArchive, name: str, arrays: dict[str, np.ndarray]
) -> None:
    """Add a signature without inputs that returns arrays."""
    tensors = {key: tf.constant(value) for key, value in arrays.items()}

    @tf.function(input_signature=[])
    def constants() -> dict[str, Any]:
        return {key: tf.identity(value) for key, value in tensors.items()}

    constants()  # Traced here: Keras traces no function without inputs.
    archive.add_endpoint(name, constants)


def _as_arrays(profile: Profile) -> dict[str, np.ndarray]:
    arrays = {"tasks": np.array(profile.tasks, str), "weights": profile.weights}
    for kind in KINDS:
        lifts = getattr(profile, kind)
        # Objects: an empty array of str is no tensor of strings.
        arrays[kind] = np.array(lifts.names, object)
        arrays[f"{kind}_lifts"] = lifts.values
    return arrays


def _popular(sequences: Sequences, catalogue: Catalogue) -> dict[str, np.ndarray]:
    """Return the most rated movies, with the size of the catalogue."""
    counts = np.bincount(sequences.movies, minlength=len(catalogue))
    most = np.argsort(-counts, kind="stable")[:NUM_POPULAR]
    return {
        "movie_id": catalogue.movie_ids[most],
        "title": catalogue.titles[most],
        "year": catalogue.years[most].astype("int32"),
        "num_movies": np.array(len(catalogue), "int32"),
    }


def _genre_names(catalogue: Catalogue) -> np.ndarray:
    """Return the genres of each movie as one str, (i,)."""
    return np.array([", ".join(filter(None, row)) for row in catalogue.genres], str)
