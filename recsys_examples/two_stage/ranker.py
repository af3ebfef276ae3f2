"""The second stage: a multi-task ranker of the candidates.

    h_t     MMoE(user)_t or PLE(user)_t                   one mixture a task
    phi     [pair, relu(W pair + b)]                      what the pair shows
    score_t = <A_t h_t, phi> + Tower_t(h_t)               and + the first stage's score
                                                          for t = watch

As in the first example the mixture says, user by user, what counts for a task; here it
weighs features of the pair instead of a movie's learned vector. It runs once a user,
not once a candidate, which is what makes 200 candidates cheap.

The ranker learns from moments after the past that the first stage was fitted to: there
alone the first stage's scores are worth what they will be worth in use.

Axis letters: n moments, c candidates, p pair features, u user features, i movies.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_moe.layers import PLE, MMoE, Tower
from keras_moe.multitask import MultiTaskModel
from recsys_examples.movielens import model as movielens
from recsys_examples.movielens.features import Sequences
from recsys_examples.movielens.ranking import LIKED
from recsys_examples.movielens.training import compile_ranker
from recsys_examples.two_stage.pairs import PAIR_FEATURES
from recsys_examples.two_stage.settings import TASKS, Settings

_NO_CANDIDATE = -1.0
_LEVEL_WEIGHT = 0.05
_FARTHEST = 3.0  # standard deviations


@dataclass(frozen=True)
class Moments:
    """Users at moments of a window, and what they watched next.

    Attributes:
        users: (n,) user rows.
        ends: (n,) how many of the user's ratings have happened.
        movies: (n, block) catalogue rows watched next, -1 where the window ends.
        stars: (n, block) their ratings.
    """

    users: np.ndarray
    ends: np.ndarray
    movies: np.ndarray
    stars: np.ndarray

    @classmethod
    def between(cls, past: Sequences, until: Sequences, block: int) -> Moments:
        """Cut what came after the past into blocks, each with its moment before.

        Args:
            past: the ratings until the window.
            until: the same, and the window's.
            block: movies watched next of one moment.
        """
        begins, lengths = past.lengths, until.lengths
        counts = -(-(lengths - begins) // block)
        users = np.repeat(np.arange(len(begins)), counts)
        nth = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = begins[users] + block * nth
        steps = ends[:, None] + np.arange(block)
        inside = steps < lengths[users][:, None]
        at = np.where(inside, until.starts[users][:, None] + steps, 0)
        return cls(
            users,
            ends,
            np.where(inside, until.movies[at], -1),
            np.where(inside, until.ratings[at], 0.0),
        )


@dataclass(frozen=True)
class Examples:
    """What the ranker is fitted to.

    Attributes:
        users: (n, u) features.
        pairs: (n, c, p) features.
        stars: (n, c) the rating of a candidate that was watched next, 0 of one that
            was not, and -1 where there is no candidate.
    """

    users: np.ndarray
    pairs: np.ndarray
    stars: np.ndarray

    @classmethod
    def of(
        cls, moments: Moments, rows: np.ndarray, users: np.ndarray, pairs: np.ndarray
    ) -> Examples:
        """Give the candidates `rows` (n, c), -1 for none, their labels."""
        stars = np.where(rows < 0, _NO_CANDIDATE, 0.0).astype(np.float32)
        for n, (movies, given) in enumerate(
            zip(moments.movies, moments.stars, strict=True)
        ):
            for movie, star in zip(movies[movies >= 0], given, strict=False):
                stars[n, rows[n] == movie] = star
        return cls(users, pairs, stars)

    def joined(self, other: Examples) -> Examples:
        """Return the examples of both."""
        return Examples(
            *(
                np.concatenate([getattr(self, f.name), getattr(other, f.name)])
                for f in fields(self)
            )
        )

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """By task: watch (n, c) with -1 for no candidate, the others (n, c, 1)."""
        return {
            "watch": np.sign(self.stars),
            "like": (self.stars >= LIKED).astype(np.float32)[..., None],
            "rating": np.maximum(self.stars, 0.0)[..., None],
        }

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """By task: like and rating count where the candidate was watched."""
        watched = (self.stars > 0).astype(np.float32)
        ones = np.ones(len(watched), np.float32)
        return {"watch": ones, "like": watched, "rating": watched}


def build_ranker(settings: Settings, users: np.ndarray) -> MultiTaskModel:
    """Build the ranker: (n, u) and (n, c, p) -> watch (n, c), the others (n, c, 1).

    Args:
        settings: sizes.
        users: (n, u) those it will learn from, for their mean and spread.
    """
    normalised = layers.Normalization(name="normalise")
    normalised.adapt(users)
    user = keras.Input((users.shape[1],), name="user")
    pair = keras.Input((None, len(PAIR_FEATURES)), name="pair")
    # Whoever is unlike all that it has learned from, as a newcomer, is not far away.
    known = ops.clip(normalised(user), -_FARTHEST, _FARTHEST)
    shared = _mixture(settings)(layers.Dropout(settings.dropout)(known))
    hidden = layers.Dense(settings.units, activation="relu", name="pair_hidden")(pair)
    phi = ops.concatenate([pair, hidden], axis=-1)
    weights = ops.stack(
        [
            layers.Dense(
                phi.shape[-1],
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
                name=f"weights_{task}",
            )(shared[task])
            for task in TASKS
        ],
        axis=-1,
    )  # (n, p + hidden, tasks)
    levels = ops.stack(
        [Tower((), name=f"level_{task}")(shared[task]) for task in TASKS], axis=-1
    )
    scores = ops.split(ops.matmul(phi, weights) + levels, len(TASKS), axis=-1)
    outputs = dict(zip(TASKS, scores, strict=True))
    first_stage = pair[..., PAIR_FEATURES.index("score_to_best")]
    outputs["watch"] = outputs["watch"][..., 0] + first_stage
    return MultiTaskModel([user, pair], outputs, name="two_stage_ranker")


def _mixture(settings: Settings) -> keras.layers.Layer:
    if settings.ranker == "ple":
        return PLE(1, 1, 1, settings.units, TASKS)
    return MMoE(settings.num_experts, settings.units, TASKS)


def fit_ranker(
    examples: Examples,
    settings: Settings,
    *,
    seed: int,
    epochs: int | None = None,
    callbacks: list[Any] | None = None,
    verbose: int = 0,
) -> tuple[MultiTaskModel, dict[str, list[float]]]:
    """Train a ranker; return it and its curves.

    Args:
        examples: what it learns from.
        settings: sizes and rates.
        seed: seed of the weights, the dropout and the order.
        epochs: the number of epochs; `settings.ranker_epochs` by default.
        callbacks: as in `keras.Model.fit`, given the model to watch.
        verbose: as in `keras.Model.fit`.
    """
    keras.utils.set_random_seed(seed)
    model = build_ranker(settings, examples.users)
    rates = movielens.Settings(
        block=settings.block,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_epochs=settings.ranker_epochs,
        task_weights=settings.task_weights,
        level_weight=_LEVEL_WEIGHT,
    )
    compile_ranker(model, rates, TASKS, -(-len(examples.stars) // rates.batch_size))
    history = model.fit(
        [examples.users, examples.pairs],
        examples.labels,
        sample_weight=examples.weights,
        batch_size=settings.batch_size,
        epochs=epochs or settings.ranker_epochs,
        callbacks=callbacks,
        verbose=verbose,
    )
    curves = {name: [float(v) for v in h] for name, h in history.history.items()}
    return model, curves
