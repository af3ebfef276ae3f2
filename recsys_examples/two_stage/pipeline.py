"""From ratings to a measured pipeline: the ranker learns from what came after the past
that its first stage was fitted to.

    first stage fitted to           ranker learns from         used for
    the early training ratings  ->  the late training ratings  both rankers
    all training ratings        ->  the validation window      choices, final ranker
    all before the test window  ->                             test, export

Choices (epochs, weights of the fusion, diversity) are made on the validation window by
a ranker that has not seen it. The final ranker learns from both windows. The test
window is read once, by what is kept.

Axis letters: b users, n moments, c candidates, i movies of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.pipeline import Windows
from recsys_examples.movielens.ranking import RankingTask, Scorer, rank
from recsys_examples.movielens.training import Validation
from recsys_examples.two_stage.fusion import (
    Fusion,
    diverse_top,
    fuse,
    intra_list_diversity,
)
from recsys_examples.two_stage.pairs import PairFeatures, genre_vectors
from recsys_examples.two_stage.ranker import Examples, Moments, fit_ranker
from recsys_examples.two_stage.retrieval import fit_retrieval, make_index
from recsys_examples.two_stage.settings import LIST_LENGTH, TASKS, Settings
from recsys_examples.two_stage.towers import HIDDEN, Retrieval

_AT_ONCE = 256
FUNNEL = (10, 20, 50, 100, 200, 500, 1000)


class Candidates(NamedTuple):
    """What the first stage hands over.

    Attributes:
        rows: (n, c) catalogue rows, -1 where no movie is left.
        users: (n, u) features of the users.
        pairs: (n, c, p) features of the pairs.
    """

    rows: np.ndarray
    users: np.ndarray
    pairs: np.ndarray


class FirstStage:
    """Retrieval as of a moment of time: its index, and what it counts of the past.

    Args:
        retrieval: the trained towers.
        past: the ratings they were fitted to.
        catalogue: all movies.
        settings: number of candidates, and of related movies.
    """

    def __init__(
        self,
        retrieval: Retrieval,
        past: Sequences,
        catalogue: Catalogue,
        settings: Settings,
    ) -> None:
        self.retrieval, self.past, self.catalogue = retrieval, past, catalogue
        popularity = np.bincount(past.movies, minlength=len(catalogue))
        self.index = make_index(retrieval.candidates, popularity, settings)
        self.pairs = PairFeatures(past, catalogue, settings.related)

    def candidates(
        self, sequences: Sequences, users: np.ndarray, ends: np.ndarray
    ) -> Candidates:
        """Return the candidates of users at moments.

        Args:
            sequences: ratings of the users; only the first `ends` are looked at.
            users: (n,) user rows.
            ends: (n,) how many of each user's ratings have happened.
        """
        found = [
            self._candidates(sequences, users[at:][:_AT_ONCE], ends[at:][:_AT_ONCE])
            for at in range(0, len(users), _AT_ONCE)
        ]
        return Candidates(*map(np.concatenate, zip(*found, strict=True)))

    def _candidates(
        self, sequences: Sequences, users: np.ndarray, ends: np.ndarray
    ) -> Candidates:
        user = sequences.histories(self.catalogue, users, ends)
        tensors = {name: keras.ops.convert_to_tensor(v) for name, v in user.items()}
        nth = np.arange(ends.sum()) - np.repeat(np.cumsum(ends) - ends, ends)
        seen = sequences.movies[np.repeat(sequences.starts[users], ends) + nth]
        seen = np.stack([np.repeat(np.arange(len(users)), ends), seen], axis=1)
        queries = self.retrieval.query.predict_on_batch(user)
        scores, rows = self.index(
            (keras.ops.convert_to_tensor(queries), keras.ops.convert_to_tensor(seen))
        )
        of_user, of_pair = self.pairs(tensors, rows, scores)
        nobody = np.asarray(scores) < HIDDEN / 2
        rows = np.where(nobody, -1, np.asarray(rows))
        return Candidates(rows, np.asarray(of_user), np.asarray(of_pair))


@dataclass(frozen=True)
class Outcome:
    """A trained pipeline and what it is worth on the test window.

    Attributes:
        settings: what it is made of.
        stage: the first stage, fitted to all before the test window.
        ranker: the second.
        fusion: how their scores become a list.
        metrics: by name.
        chosen: what was chosen on validation, and the figures it was chosen by.
        funnel: by number of candidates, the share of relevant movies among them.
    """

    settings: Settings
    stage: FirstStage
    ranker: keras.Model
    fusion: Fusion
    metrics: dict[str, float]
    chosen: dict[str, Any]
    funnel: dict[int, float]


def cut_late(sequences: Sequences, share: float) -> Sequences:
    """Return the sequences without each user's last ratings, at least one of two."""
    lengths = sequences.lengths
    late = np.maximum((lengths * share).astype(int), 1) * (lengths > 1)
    kept = np.arange(len(sequences.movies)) < (sequences.starts[1:] - late).repeat(
        lengths
    )
    return Sequences(
        sequences.user_ids,
        np.concatenate([[0], np.cumsum(lengths - late)]),
        sequences.movies[kept],
        sequences.ratings[kept],
        sequences.timestamps[kept],
    )


@dataclass(frozen=True)
class Stages:
    """The first stage as of three moments, see the top of this file."""

    early: FirstStage
    trained: FirstStage
    last: FirstStage


def fit_first_stages(
    windows: Windows,
    settings: Settings,
    seed: int = 0,
    announce: Callable[[str], None] = lambda _: None,
) -> Stages:
    """Train the first stage three times; its epochs are chosen on validation.

    Raises:
        InputError: if `settings.candidates` is not a number of movies that the
            catalogue has and a list needs.
    """
    catalogue = windows.catalogue
    check_candidates(settings.candidates, len(catalogue))

    def fitted(past: Sequences, **how: Any) -> FirstStage:
        retrieval = fit_retrieval(past, catalogue, settings, seed=seed, **how)
        return FirstStage(retrieval, past, catalogue, settings)

    announce("First stage: on the training window, watched on validation.")
    validation = Validation(windows.before_test, windows.validation_task)
    trained = fitted(windows.train, validation=validation)
    epochs = trained.retrieval.epochs
    announce(f"{epochs} epochs. On the early part, then on all before the test window.")
    early = fitted(cut_late(windows.train, settings.late), epochs=epochs)
    return Stages(early, trained, fitted(windows.before_test, epochs=epochs))


def run_second_stage(
    windows: Windows,
    stages: Stages,
    settings: Settings,
    seed: int = 0,
    announce: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train the ranker, choose on validation, and measure on the test window."""
    announce("Ranker: on the late training ratings, watched on validation.")
    lessons = examples_of(stages.early, windows.train, settings)
    watch = _OnValidation(stages.trained, windows.validation_task)
    _, curves = fit_ranker(lessons, settings, seed=seed, callbacks=[watch])
    fusion, chosen = watch.choose(settings)
    announce(f"{watch.epochs} epochs, {fusion}. On the validation window, too.")
    lessons = lessons.joined(examples_of(stages.trained, windows.before_test, settings))
    ranker, _ = fit_ranker(lessons, settings, seed=seed, epochs=watch.epochs)
    metrics, funnel = measure(stages.last, ranker, fusion, windows.test_task)
    chosen |= {
        "retrieval_epochs": stages.trained.retrieval.epochs,
        "ranker_epochs": watch.epochs,
        "fusion": fusion._asdict(),
        "curves": curves,
    }
    return Outcome(settings, stages.last, ranker, fusion, metrics, chosen, funnel)


def check_candidates(candidates: int, num_movies: int) -> None:
    """Refuse a number of candidates that cannot be found or makes no list."""
    if not LIST_LENGTH <= candidates <= num_movies:
        raise InputError(
            f"candidates must be from {LIST_LENGTH}, the length of a list, to "
            f"{num_movies:,}, the movies of the catalogue, not {candidates:,}"
        )


def examples_of(stage: FirstStage, until: Sequences, settings: Settings) -> Examples:
    """Return what a ranker learns from the ratings after those of the first stage.

    Args:
        stage: the first stage.
        until: the ratings it was fitted to, and after them the window to learn from.
        settings: the number of movies that a moment asks for.
    """
    moments = Moments.between(stage.past, until, settings.block)
    return Examples.of(moments, *stage.candidates(until, moments.users, moments.ends))


class Ranked:
    """The candidates of a task's users, scored and listed.

    Args:
        stage: the first stage.
        task: who is ranked for. What they have seen is what the stage was fitted to.
    """

    def __init__(self, stage: FirstStage, task: RankingTask) -> None:
        self.task, self._genres = task, genre_vectors(stage.catalogue)
        lengths = stage.past.lengths[task.users]
        self.rows, *self._features = stage.candidates(stage.past, task.users, lengths)

    def predict(self, ranker: keras.Model) -> dict[str, np.ndarray]:
        """Return the scores (b, c) of each task."""
        scores = ranker.predict(self._features, batch_size=_AT_ONCE, verbose=0)
        return {task: scores[task].reshape(self.rows.shape) for task in TASKS}

    def lists(self, scores: dict[str, np.ndarray], fusion: Fusion) -> np.ndarray:
        """Return (b, k) catalogue rows, -1 where no movie is left."""
        fused = np.where(self.rows < 0, HIDDEN, np.asarray(fuse(scores, fusion)))
        top = diverse_top(
            keras.ops.convert_to_tensor(fused),
            keras.ops.convert_to_tensor(np.maximum(self.rows, 0)),
            keras.ops.convert_to_tensor(self._genres),
            LIST_LENGTH,
            fusion.diversity,
        )
        return np.take_along_axis(self.rows, np.asarray(top), axis=1)

    def ndcg(self, lists: np.ndarray) -> float:
        """Return the NDCG@k of lists (b, k): the same as in `quality`, fast."""
        relevant = self.task.relevant[self.task.users]
        users = np.arange(len(lists))[:, None]
        hits = relevant[users, np.maximum(lists, 0)].toarray()
        discounts = 1 / np.log2(np.arange(2, 2 + lists.shape[1]))
        most = np.cumsum(discounts)
        ideal = most[np.minimum(relevant.getnnz(axis=1), lists.shape[1]) - 1]
        return float((hits * (lists >= 0) @ discounts / ideal).mean())

    def quality(self, lists: np.ndarray) -> dict[str, float]:
        """Return NDCG, recall and coverage at 10, and how little a list repeats."""
        return {
            **rank(as_scorer(self.task, lists), self.task, LIST_LENGTH),
            "diversity@10": self.diversity(lists),
        }

    def diversity(self, lists: np.ndarray) -> float:
        """Return how little the lists repeat genres; see `intra_list_diversity`."""
        return intra_list_diversity(lists, self._genres)


def as_scorer(task: RankingTask, lists: np.ndarray) -> Scorer:
    """Return scores of the catalogue whose best movies are those of the lists (b, k).

    The lists are those of `task.users`, -1 where they end early.
    """
    size = task.relevant.shape[1]
    place = np.zeros(task.relevant.shape[0], int)
    place[task.users] = np.arange(len(task.users))

    def score(users: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(users), size + 1), np.float32)
        worth = np.arange(lists.shape[1], 0, -1, dtype=np.float32)
        np.put_along_axis(scores, lists[place[users]], worth[None], axis=1)
        return scores[:, :size]

    return score


class _OnValidation(keras.callbacks.Callback):
    """Ranks the validation window after every epoch, and keeps the best."""

    def __init__(self, stage: FirstStage, task: RankingTask) -> None:
        super().__init__()
        self._ranked = Ranked(stage, task)
        self._best = -1.0
        self.epochs = 0
        self._scores: dict[str, np.ndarray] = {}

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        scores = self._ranked.predict(self.model)
        found = self._ndcg(scores, Fusion())
        if logs is not None:
            logs["val_ndcg@10"] = found
        if found > self._best:
            self._best, self.epochs, self._scores = found, epoch + 1, scores

    def _ndcg(self, scores: dict[str, np.ndarray], fusion: Fusion) -> float:
        return self._ranked.ndcg(self._ranked.lists(scores, fusion))

    def choose(self, settings: Settings) -> tuple[Fusion, dict[str, Any]]:
        """Return the best fusion weights, then the most diversity they can afford."""
        weights = {
            Fusion(like, rating): 0.0
            for like in settings.like_weights
            for rating in settings.rating_weights
        }
        for fusion in weights:
            weights[fusion] = self._ndcg(self._scores, fusion)
        best = max(weights, key=lambda fusion: weights[fusion])
        least = (1 - settings.tolerance) * weights[best]
        lists = {
            d: self._ranked.lists(self._scores, best._replace(diversity=d))
            for d in settings.diversities
        }
        diversities = {
            d: {
                "ndcg@10": self._ranked.ndcg(found),
                "diversity@10": self._ranked.diversity(found),
            }
            for d, found in lists.items()
        }
        kept = max(d for d, q in diversities.items() if d == 0 or q["ndcg@10"] >= least)
        found = {
            "validation_weights": [[*f[:2], ndcg] for f, ndcg in weights.items()],
            "validation_diversity": {str(d): q for d, q in diversities.items()},
        }
        return best._replace(diversity=kept), found


def measure(
    stage: FirstStage, ranker: keras.Model, fusion: Fusion, task: RankingTask
) -> tuple[dict[str, float], dict[int, float]]:
    """Return all figures of a window, and recall by the number of candidates."""
    past = stage.past
    everyone = np.arange(len(past.user_ids))
    catalogue_scores = stage.retrieval.scores(past.histories(stage.catalogue, everyone))

    def alone(users: np.ndarray) -> np.ndarray:
        return catalogue_scores[users]

    ranked = Ranked(stage, task)
    scores = ranked.predict(ranker)
    final = ranked.quality(ranked.lists(scores, fusion))
    sorted_ = ranked.quality(ranked.lists(scores, fusion._replace(diversity=0.0)))
    first = ranked.quality(ranked.rows[:, :LIST_LENGTH])
    size = len(stage.catalogue)
    funnel = {k: rank(alone, task, k)[f"recall@{k}"] for k in FUNNEL if k <= size}
    candidates = ranked.rows.shape[1]
    metrics = {
        **final,
        **{f"{name} without diversity": value for name, value in sorted_.items()},
        **{f"{name} of retrieval": value for name, value in first.items()},
        "recall@candidates": rank(alone, task, candidates)[f"recall@{candidates}"],
    }
    return metrics, funnel
