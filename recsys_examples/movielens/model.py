"""The ranker: a user's history, through a multi-gate mixture of experts, meets movies.

    x    what is known of a user: the pooled history, a few counts, the id
    h_t  = MMoE(x)_t                                one mixture of experts a task
                                                    (or what `Settings.body` names)
    u_t  = W_t h_t, and + the pooled history for t = watch
    v    = id embedding + projected genres and year      one vector a movie
    score_t(user, movie) = <u_t, v> + bias_t(movie) + Tower_t(h_t)

A movie meets a user only in the last line, so the whole catalogue is scored by one
matmul. That makes two things cheap: training against all unseen movies instead of a
few sampled ones, and recommending.

Axis letters: b batch, l history length, p pools, d dimensions of a vector, i movies of
the catalogue, c movies watched next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MMoE, MoE, SharedBottom, Tower
from keras_moe.multitask import MultiTaskModel
from recsys_examples.movielens.features import HISTORY_LENGTH, NO_MOVIE, Catalogue
from recsys_examples.movielens.movies import CatalogueScores, MovieSide, normal

TASKS = ("watch", "like", "rating")
EVALUATION_NEGATIVES = 4  # unseen movies to a watched one, where watch is a probability

_CHOSEN_EXPERTS = 2  # experts of the sparse MoE that a user goes to
_LAST_SEEN = tuple(range(1996, 2030))
_RATING_STEPS = 11  # 0 to 5 stars by halves


@dataclass(frozen=True)
class Settings:
    """What the model and its training are made of.

    Attributes:
        body: "mmoe", "shared_bottom", or "moe": a sparse mixture of experts in the
            place of the shared bottom's one Dense layer.
        dimensions: size of movie and user vectors.
        num_experts: experts of the MMoE, or of the sparse MoE.
        units: width of an expert, or of the shared bottom.
        recency: the weight of a movie of the history starts to fall by a factor of e
            with so many later ones; one pool of the history for each.
        history_dropout: share of the history's movies hidden in a training example.
        dropout: share of the inputs of the body that is dropped.
        block: movies watched next that one training example predicts.
        batch_size: training examples a step.
        learning_rate: of Adam, falling by a cosine to a twentieth.
        max_epochs: passes over the data at most.
        level_weight: weight of the cross-entropy that makes watch a probability.
        task_weights: weights of the like and the rating loss; watch has 1.
    """

    body: str = "mmoe"
    dimensions: int = 64
    num_experts: int = 4
    units: int = 64
    recency: tuple[float, ...] = (3.0, 10.0, 1e9)
    history_dropout: float = 0.3
    dropout: float = 0.2
    block: int = 5
    batch_size: int = 128
    learning_rate: float = 5e-3
    max_epochs: int = 4
    level_weight: float = 0.05
    task_weights: tuple[float, float] = (0.1, 0.1)


class Calibration(NamedTuple):
    """The log odds that a movie is watched, as a line in its score."""

    slope: float
    offset: float


class Towers(NamedTuple):
    """The two sides of a task's score, which meet in one dot product.

    Attributes:
        users: the features of users -> (b, d) vectors.
        movies: scores them against the catalogue; `all_movies` is the other side.
    """

    users: keras.Model
    movies: CatalogueScores


@dataclass(frozen=True)
class Ranker:
    """Models over the same layers.

    Attributes:
        training: the features of users at some moment -> the scores that the losses
            need. Its input `next_movies` (b, c) are the catalogue rows watched next.
        catalogue: the features of users -> per task (b, i) scores of all movies.
        pairs: the raw features of users and movies -> per task (b,) a prediction:
            the probability of watch and of like, and the stars of rating.
        lookups: the inputs of `training` -> a list of tensors, with ids looked up,
            from which the rest of `training` follows. See `behind_lookups`.
        user: the features of users -> what the body sees, for a look at its gates.
        towers: per task, what its scores are the dot product of.
        body: the layer that the tasks share.
        calibration: what makes a probability of a watch score.
    """

    training: keras.Model
    catalogue: keras.Model
    pairs: keras.Model
    lookups: keras.Model
    user: keras.Model
    towers: dict[str, Towers]
    body: keras.layers.Layer
    calibration: Calibration

    def behind_lookups(self) -> keras.Model:
        """Return `training` from the outputs of `lookups` on, with the same weights.

        XLA has no hash tables, and Keras compiles no model that holds one.
        """
        return MultiTaskModel(self.lookups.output, self.training.output)


def build_ranker(
    catalogue: Catalogue,
    user_ids: np.ndarray,
    popularity: np.ndarray,
    settings: Settings,
    tasks: tuple[str, ...] = TASKS,
    calibration: Calibration | None = None,
) -> Ranker:
    """Build the models.

    Args:
        catalogue: all movies.
        user_ids: ids of the known users.
        popularity: (i,) ratings of each movie in the training window, from which
            the movies' watch biases start.
        settings: sizes and rates.
        tasks: the tasks to learn, some of `TASKS`.
        calibration: of the watch scores, if it is known from an earlier fit.
    """
    movies = MovieSide(catalogue, popularity, settings.dimensions, tasks)
    user_inputs = {
        "user_id": keras.Input((), dtype="int64", name="user_id"),
        "history": keras.Input((HISTORY_LENGTH,), dtype="int64", name="history"),
        "history_ratings": keras.Input((HISTORY_LENGTH,), name="history_ratings"),
        "last_seen": keras.Input((), dtype="int64", name="last_seen"),
    }
    known_user = layers.IntegerLookup(vocabulary=user_ids, name="user_lookup")
    looked_up = {
        "user_row": known_user(user_inputs["user_id"]),
        "history_rows": movies.lookup(user_inputs["history"]),
        **{name: user_inputs[name] for name in user_inputs if name != "user_id"},
    }
    pools, features = _user_features(
        looked_up, movies.lookup.vocabulary_size(), len(user_ids) + 1, settings
    )
    body = _body(settings, tasks)
    shared = body(features)
    if settings.body == "moe":
        shared = dict.fromkeys(tasks, shared)
    users = {task: _user_vector(task, shared[task], pools, settings) for task in tasks}
    levels = {task: Tower((), name=f"level_{task}")(shared[task]) for task in tasks}
    scorers = {task: movies.scores_of_all(task) for task in tasks}
    scores = {task: scorers[task](users[task]) + levels[task] for task in tasks}

    next_movies = keras.Input((None,), dtype="int32", name="next_movies")
    training_outputs = {
        task: score
        if task == "watch"
        else ops.expand_dims(ops.take_along_axis(score, next_movies, axis=1), -1)
        for task, score in scores.items()
    }
    training_inputs = {**user_inputs, "next_movies": next_movies}
    calibration = calibration or _prior_calibration(settings, len(catalogue))
    movie_inputs = movies.inputs()
    pair_scores = {
        task: movies.score_of_one(task, movie_inputs, users[task])
        + ops.squeeze(levels[task], -1)
        for task in tasks
    }
    return Ranker(
        training=MultiTaskModel(training_inputs, training_outputs),
        catalogue=MultiTaskModel(user_inputs, scores),
        pairs=MultiTaskModel(
            {**user_inputs, **movie_inputs},
            {
                task: layers.Identity(name=task)(prediction(task, score, calibration))
                for task, score in pair_scores.items()
            },
            name="movielens_ranker",
        ),
        # A list, because in a dict Keras wants inputs under the names of tensors.
        lookups=keras.Model(training_inputs, [*looked_up.values(), next_movies]),
        user=keras.Model(user_inputs, features),
        towers={
            task: Towers(keras.Model(user_inputs, users[task]), scorers[task])
            for task in tasks
        },
        body=body,
        calibration=calibration,
    )


def prediction(task: str, score: Any, calibration: Calibration) -> Any:
    """Turn scores of a task into what it predicts: a probability, or stars."""
    if task == "rating":
        return score
    if task == "watch":
        score = calibration.slope * score + calibration.offset
    return ops.sigmoid(score)


def _prior_calibration(settings: Settings, num_movies: int) -> Calibration:
    """Account for the change in odds from training to use.

    Scores are learned where `block` of all movies are watched, and a probability is
    asked where 1 is watched for every `EVALUATION_NEGATIVES` that are not.
    """
    offset = np.log(1 / EVALUATION_NEGATIVES) - np.log(settings.block / num_movies)
    return Calibration(slope=1.0, offset=float(offset))


def _body(settings: Settings, tasks: tuple[str, ...]) -> keras.layers.Layer:
    if settings.body == "shared_bottom":
        return SharedBottom(settings.units, tasks, name="shared_bottom")
    if settings.body == "moe":
        experts = MLPExperts(
            settings.num_experts, settings.units, final_activation="relu"
        )
        top_k = min(_CHOSEN_EXPERTS, settings.num_experts)
        return MoE(settings.num_experts, top_k=top_k, experts=experts, name="moe")
    return MMoE(settings.num_experts, settings.units, tasks, name="mmoe")


def _user_features(
    inputs: dict[str, Any], num_movie_rows: int, num_user_rows: int, settings: Settings
) -> tuple[Any, Any]:
    """Return the pooled history (b, p, d) and all that the body sees (b, features)."""
    ratings = inputs["history_ratings"]
    watched = ops.cast(inputs["history"] != NO_MOVIE, "float32")
    movie_vectors = layers.Embedding(
        num_movie_rows,
        settings.dimensions,
        embeddings_initializer=normal(0.05),
        name="history_movies",
    )(inputs["history_rows"])
    rating_vectors = layers.Embedding(
        _RATING_STEPS,
        settings.dimensions,
        embeddings_initializer="zeros",
        name="history_stars",
    )(ops.cast(ops.clip(ratings, 0.0, 5.0) * 2, "int32"))
    # Whole movies are hidden, so that no single one of them is relied upon.
    kept = layers.Dropout(settings.history_dropout, name="hide_movies")(watched)
    vectors = (movie_vectors + rating_vectors) * ops.expand_dims(kept, -1)
    pooling = layers.EinsumDense(
        "bld,lp->bpd",
        (len(settings.recency), settings.dimensions),
        name="recency_pools",
    )
    pools = pooling(vectors)
    pooling.set_weights([_recency_weights(settings.recency)])

    count = ops.sum(watched, 1, keepdims=True)
    share = 1.0 / ops.maximum(count, 1.0)
    liked = ops.cast(ratings >= 4.0, "float32")
    summary = [
        layers.Flatten()(pools),
        ops.log1p(count),
        ops.sum(ratings, 1, keepdims=True) * share - 3.5 * ops.minimum(count, 1.0),
        ops.sum(liked, 1, keepdims=True) * share,
        layers.Embedding(len(_LAST_SEEN) + 1, 8, name="last_seen_years")(
            layers.Discretization(_LAST_SEEN, name="last_seen_bins")(
                inputs["last_seen"]
            )
        ),
        layers.Embedding(num_user_rows, 8, name="users")(inputs["user_row"]),
    ]
    features = layers.Concatenate(name="user_features")(summary)
    return pools, layers.Dropout(settings.dropout)(features)


def _user_vector(task: str, shared: Any, pools: Any, settings: Settings) -> Any:
    vector = layers.Dense(
        settings.dimensions, kernel_initializer=normal(0.05), name=f"user_{task}"
    )(shared)
    if task != "watch":
        return vector
    # The item-to-item way: movies that follow each other find each other directly.
    return vector + ops.sum(pools, axis=1)


def _recency_weights(recency: tuple[float, ...]) -> np.ndarray:
    """Start the pools (l, p) as means of the history that fade exponentially."""
    ago = np.arange(HISTORY_LENGTH)[:, None]
    weights = np.exp(-ago / np.array(recency))
    # Ten times a mean: many histories are shorter than the full length.
    return 10 * weights / weights.sum(0)
