"""The second stage: a multi-task ranker of the candidates.

    h_t     MMoE(user)_t or PLE(user)_t                   one mixture per task
    phi     [pair, relu(W pair + b)]                      pair features
    score_t = <A_t h_t, phi> + Tower_t(h_t)               and + the first stage's score
                                                          for t = watch

As in the MovieLens example, the output of the mixture is a user vector per task; here
it is multiplied with pair features instead of a movie embedding. The mixture is
computed once per user, not per candidate, which makes 200 candidates cheap.

The ranker is trained on ratings later than those the first stage was trained on: only
there do the first stage's scores have the same distribution as in serving.

Axis letters: n examples, c candidates, p pair features, u user features, i movies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from keras_moe.layers import PLE, MMoE, Tower
from keras_moe.multitask import MultiTaskModel
from recsys_examples.movielens import model as movielens
from recsys_examples.movielens.features import Sequences
from recsys_examples.movielens.ranking import LIKED
from recsys_examples.movielens.training import compile_ranker, exact_backup
from recsys_examples.two_stage.pairs import PAIR_FEATURES
from recsys_examples.two_stage.settings import TASKS, Settings

_NO_CANDIDATE = -1.0
_LEVEL_WEIGHT = 0.05
_CLIP = 3.0  # standard deviations


@dataclass(frozen=True)
class Moments:
    """Users at points of time in a window, and the movies they watched next.

    Attributes:
        users: (n,) user rows.
        ends: (n,) number of the user's ratings before that time.
        movies: (n, block) catalogue rows watched next, -1 after the end of the window.
        stars: (n, block) their ratings.
    """

    users: np.ndarray
    ends: np.ndarray
    movies: np.ndarray
    stars: np.ndarray

    @classmethod
    def between(cls, past: Sequences, until: Sequences, block: int) -> Moments:
        """Split the ratings after `past` into blocks; each gives one example.

        Args:
            past: the ratings before the window.
            until: the ratings before and in the window.
            block: number of movies per block.
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
    """Training examples of the ranker.

    Attributes:
        users: (n, u) user features.
        pairs: (n, c, p) pair features.
        stars: (n, c) the rating of a candidate that was watched next, 0 of one that
            was not, and -1 for padding.
    """

    users: np.ndarray
    pairs: np.ndarray
    stars: np.ndarray

    @classmethod
    def of(
        cls, moments: Moments, rows: np.ndarray, users: np.ndarray, pairs: np.ndarray
    ) -> Examples:
        """Return examples of the candidates `rows` (n, c), -1 for padding."""
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
        """Labels by task: watch (n, c) with -1 for padding, the others (n, c, 1)."""
        return {
            "watch": np.sign(self.stars),
            "like": (self.stars >= LIKED).astype(np.float32)[..., None],
            "rating": np.maximum(self.stars, 0.0)[..., None],
        }

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Sample weights by task: like and rating only for watched candidates."""
        watched = (self.stars > 0).astype(np.float32)
        ones = np.ones(len(watched), np.float32)
        return {"watch": ones, "like": watched, "rating": watched}


def build_ranker(settings: Settings, users: np.ndarray) -> MultiTaskModel:
    """Build the ranker: (n, u) and (n, c, p) -> watch (n, c), the others (n, c, 1).

    Args:
        settings: hyperparameters.
        users: (n, u) features of the training examples, for normalization.
    """
    normalised = layers.Normalization(name="normalise")
    normalised.adapt(users)
    user = keras.Input((users.shape[1],), name="user")
    pair = keras.Input((None, len(PAIR_FEATURES)), name="pair")
    # Clipped: users unlike those of training, such as new users, are not outliers.
    known = ops.clip(normalised(user), -_CLIP, _CLIP)
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
        return PLE(
            num_levels=1,
            num_shared_experts=1,
            num_task_experts=1,
            expert_units=settings.units,
            tasks=TASKS,
        )
    return MMoE(
        num_experts=settings.num_experts, expert_units=settings.units, tasks=TASKS
    )


def fit_ranker(
    examples: Examples,
    settings: Settings,
    *,
    seed: int,
    epochs: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
    backup: Path | None = None,
) -> tuple[MultiTaskModel, dict[str, list[float]]]:
    """Train a ranker; return it and its training curves.

    Args:
        examples: the training examples.
        settings: hyperparameters.
        seed: seed of the weights, of dropout and of shuffling.
        epochs: number of epochs. Default: `settings.ranker_epochs`.
        callbacks: as in `keras.Model.fit`.
        verbose: as in `keras.Model.fit`.
        backup: folder of backups, from which an interrupted fit goes on.
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
    if backup is not None:
        callbacks = [exact_backup(backup, callbacks), *callbacks]
    history = model.fit(
        [examples.users, examples.pairs],
        examples.labels,
        sample_weight=examples.weights,
        batch_size=settings.batch_size,
        epochs=epochs or settings.ranker_epochs,
        callbacks=[*callbacks],
        verbose=verbose,
    )
    curves = {name: [float(v) for v in h] for name, h in history.history.items()}
    return model, curves
