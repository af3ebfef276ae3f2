"""The ranker: user vectors by a multi-gate mixture of experts, and movie embeddings.

    x    user features: the pooled history, a few counts, the id
    h_t  = MMoE(x)_t                                one mixture of experts per task
                                                    (or another `Settings.body`)
    u_t  = W_t h_t, and + the pooled history for t = watch
    v    = id embedding + projected genres and year      one vector per movie
    score_t(user, movie) = <u_t, v> + bias_t(movie) + Tower_t(h_t)

User and movie interact only in the dot product: the whole catalogue is scored by one
matmul, which makes training against all unseen movies, instead of sampled ones, and
recommending cheap.

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
from recsys_examples.movielens.movies import CatalogueScores, MovieEncoder, normal

TASKS = ("watch", "like", "rating")
EVALUATION_NEGATIVES = 4  # unseen movies per watched movie, in evaluation
TOP_K = 2  # experts per user in the sparse MoE

_LAST_SEEN = tuple(range(1996, 2030))
_RATING_STEPS = 11  # 0 to 5 stars in steps of 0.5


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of the model and its training.

    Attributes:
        body: "mmoe", "shared_bottom", or "moe": a sparse mixture of experts instead of
            the shared bottom's Dense layer.
        dimensions: size of movie and user vectors.
        num_experts: number of experts of the MMoE or of the sparse MoE.
        units: width of an expert or of the shared bottom.
        recency: initial time constants of the pools of the history, in movies: the
            weight of a movie falls by a factor of e per so many later movies.
        history_dropout: fraction of the history's movies dropped in training.
        dropout: dropout rate of the inputs of the body.
        block: number of next movies per training example.
        batch_size: training examples per step.
        optimizer: "adam", or a name in `training.OPTIMIZERS`.
        learning_rate: initial learning rate, with cosine decay to 5%.
        table_multiplier: learning rate of the tables over the others' in "lazy_adam"
            and "rowwise_adagrad".
        max_epochs: maximal number of epochs.
        level_weight: weight of the cross-entropy in the watch loss, see `WatchLoss`.
        task_weights: loss weights of like and rating; that of watch is 1.
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
    optimizer: str = "adam"
    learning_rate: float = 5e-3
    table_multiplier: float = 10.0
    max_epochs: int = 4
    level_weight: float = 0.05
    task_weights: tuple[float, float] = (0.1, 0.1)


class Calibration(NamedTuple):
    """The log odds that a movie is watched, a linear function of its score."""

    slope: float
    offset: float


class Towers(NamedTuple):
    """The two towers of a task, whose dot product is the score.

    Attributes:
        users: model from user features to vectors (b, d).
        movies: layer from user vectors to scores; `all_movies` gives the movie vectors.
    """

    users: keras.Model
    movies: CatalogueScores


@dataclass(frozen=True)
class Ranker:
    """Models that share their layers.

    Attributes:
        training: model from user features to the scores that the losses need. Its
            input `next_movies` (b, c) are the catalogue rows watched next.
        catalogue: model from user features to the scores (b, i) of all movies, per
            task.
        pairs: model from raw features of users and movies to predictions (b,), per
            task: the probabilities of watch and like, and the stars of rating.
        lookups: model from the inputs of `training` to a list of tensors, with ids
            looked up: the inputs of `without_lookups()`.
        user: model from user features to the inputs of the body, to inspect its gates.
        towers: the two towers of each task.
        body: the layer that the tasks share.
        calibration: calibration of the watch scores.
    """

    training: keras.Model
    catalogue: keras.Model
    pairs: keras.Model
    lookups: keras.Model
    user: keras.Model
    towers: dict[str, Towers]
    body: keras.layers.Layer
    calibration: Calibration

    def without_lookups(self) -> keras.Model:
        """Return `training` without the lookup layers, with the same weights.

        Its inputs are the outputs of `lookups`. XLA does not support hash tables, and
        Keras does not compile models that contain one.
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
        popularity: (i,) number of ratings of each movie in the training window, for
            the initial watch biases.
        settings: hyperparameters.
        tasks: the tasks to learn, from `TASKS`.
        calibration: calibration of the watch scores, if known from an earlier fit.
    """
    movies = MovieEncoder(catalogue, popularity, settings.dimensions, tasks)
    user_inputs = _user_inputs()
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
    training_inputs = {**user_inputs, "next_movies": next_movies}
    training_outputs = _scores_for_training(scores, next_movies)
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
        pairs=_pair_model(user_inputs, movie_inputs, pair_scores, calibration),
        # A list: with a dict, Keras requires inputs named like the tensors.
        lookups=keras.Model(training_inputs, [*looked_up.values(), next_movies]),
        user=keras.Model(user_inputs, features),
        towers={
            task: Towers(keras.Model(user_inputs, users[task]), scorers[task])
            for task in tasks
        },
        body=body,
        calibration=calibration,
    )


def _user_inputs() -> dict[str, Any]:
    return {
        "user_id": keras.Input((), dtype="int64", name="user_id"),
        "history": keras.Input((HISTORY_LENGTH,), dtype="int64", name="history"),
        "history_ratings": keras.Input((HISTORY_LENGTH,), name="history_ratings"),
        "last_seen": keras.Input((), dtype="int64", name="last_seen"),
    }


def _scores_for_training(scores: dict[str, Any], next_movies: Any) -> dict[str, Any]:
    """Return watch scores (b, i) of all movies, and other scores (b, c, 1)."""
    return {
        task: score
        if task == "watch"
        else ops.expand_dims(ops.take_along_axis(score, next_movies, axis=1), -1)
        for task, score in scores.items()
    }


def _pair_model(
    user_inputs: dict[str, Any],
    movie_inputs: dict[str, Any],
    scores: dict[str, Any],
    calibration: Calibration,
) -> MultiTaskModel:
    outputs = {
        task: layers.Identity(name=task)(prediction(task, score, calibration))
        for task, score in scores.items()
    }
    return MultiTaskModel(
        {**user_inputs, **movie_inputs}, outputs, name="movielens_ranker"
    )


def prediction(task: str, score: Any, calibration: Calibration) -> Any:
    """Return the prediction of a task from its scores: a probability, or stars."""
    if task == "rating":
        return score
    if task == "watch":
        score = calibration.slope * score + calibration.offset
    return ops.sigmoid(score)


def _prior_calibration(settings: Settings, num_movies: int) -> Calibration:
    """Return the calibration for the change of prior from training to evaluation.

    In training, `block` of all movies are positive; in evaluation, there are
    `EVALUATION_NEGATIVES` negatives per positive.
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
        top_k = min(TOP_K, settings.num_experts)
        return MoE(
            num_experts=settings.num_experts, top_k=top_k, experts=experts, name="moe"
        )
    return MMoE(
        num_experts=settings.num_experts,
        expert_units=settings.units,
        tasks=tasks,
        name="mmoe",
    )


def _user_features(
    inputs: dict[str, Any], num_movie_rows: int, num_user_rows: int, settings: Settings
) -> tuple[Any, Any]:
    """Return the pooled history (b, p, d) and the inputs of the body (b, features)."""
    ratings = inputs["history_ratings"]
    watched = ops.cast(inputs["history"] != NO_MOVIE, "float32")
    pools = _pooled_history(inputs, watched, num_movie_rows, settings)
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


def _pooled_history(
    inputs: dict[str, Any], watched: Any, num_movie_rows: int, settings: Settings
) -> Any:
    """Return weighted sums (b, p, d) of the embeddings of the history (b, l)."""
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
    )(ops.cast(ops.clip(inputs["history_ratings"], 0.0, 5.0) * 2, "int32"))
    # Dropout of whole movies of the history.
    kept = layers.Dropout(settings.history_dropout, name="hide_movies")(watched)
    vectors = (movie_vectors + rating_vectors) * ops.expand_dims(kept, -1)
    pooling = layers.EinsumDense(
        "bld,lp->bpd",
        (len(settings.recency), settings.dimensions),
        name="recency_pools",
    )
    pools = pooling(vectors)
    pooling.set_weights([_recency_weights(settings.recency)])
    return pools


def _user_vector(task: str, shared: Any, pools: Any, settings: Settings) -> Any:
    vector = layers.Dense(
        settings.dimensions, kernel_initializer=normal(0.05), name=f"user_{task}"
    )(shared)
    if task != "watch":
        return vector
    # Item-to-item: the score depends directly on the movies of the history.
    return vector + ops.sum(pools, axis=1)


def _recency_weights(recency: tuple[float, ...]) -> np.ndarray:
    """Return initial weights (l, p) of the pools, which decay exponentially."""
    ago = np.arange(HISTORY_LENGTH)[:, None]
    weights = np.exp(-ago / np.array(recency))
    # Ten times a weighted mean, because many histories are shorter than l.
    return 10 * weights / weights.sum(0)
