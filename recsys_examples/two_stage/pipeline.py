"""Training and evaluation of the pipeline.

The ranker is trained on ratings later than those its first stage was trained on.

    first stage trained on          ranker trained on          used for
    early training ratings      ->  late training ratings      both rankers
    all training ratings        ->  the validation window      tuning, final ranker
    all before the test window  ->                             test, export

Epochs, fusion weights and diversity are tuned on the validation window, with a ranker
trained on the late training ratings only. The final ranker is trained on both. The test
window is used once, for the final pipeline.

Axis letters: b users, n examples, c candidates, i movies of the catalogue.
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
from recsys_examples.two_stage.pairs import PairFeatures
from recsys_examples.two_stage.ranker import Examples, Moments, fit_ranker
from recsys_examples.two_stage.retrieval import fit_retrieval, make_index
from recsys_examples.two_stage.settings import LIST_LENGTH, TASKS, Settings
from recsys_examples.two_stage.statistics import Statistics, genre_vectors
from recsys_examples.two_stage.towers import MASKED_SCORE, Retrieval

_BATCH_SIZE = 256
FUNNEL = (10, 20, 50, 100, 200, 500, 1000)


class Candidates(NamedTuple):
    """The output of the first stage.

    Attributes:
        rows: (n, c) catalogue rows, -1 where there are fewer than c candidates.
        users: (n, u) features of the users.
        pairs: (n, c, p) features of the pairs.
    """

    rows: np.ndarray
    users: np.ndarray
    pairs: np.ndarray


class FirstStage:
    """The retrieval index and the pair features, from the ratings up to some time.

    Args:
        retrieval: the trained towers.
        past: the ratings they were trained on.
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
        self.pairs = PairFeatures(Statistics.of(past, catalogue, settings.related))

    def candidates(
        self, sequences: Sequences, users: np.ndarray, ends: np.ndarray
    ) -> Candidates:
        """Return candidates, given the first `ends` ratings of each user.

        Args:
            sequences: ratings of the users.
            users: (n,) user rows.
            ends: (n,) number of the user's ratings that are used.
        """
        found = [
            self._candidates(
                sequences, users[at:][:_BATCH_SIZE], ends[at:][:_BATCH_SIZE]
            )
            for at in range(0, len(users), _BATCH_SIZE)
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
        masked = np.asarray(scores) < MASKED_SCORE / 2
        rows = np.where(masked, -1, np.asarray(rows))
        return Candidates(rows, np.asarray(of_user), np.asarray(of_pair))


@dataclass(frozen=True)
class Outcome:
    """A trained pipeline and its evaluation on the test window.

    Attributes:
        settings: settings of the pipeline.
        stage: the first stage, trained on all ratings before the test window.
        ranker: the second stage.
        fusion: weights of the score fusion.
        metrics: test metrics by name.
        chosen: settings tuned on validation, with the metrics of all values tried.
        funnel: recall of the candidates by number of candidates.
    """

    settings: Settings
    stage: FirstStage
    ranker: keras.Model
    fusion: Fusion
    metrics: dict[str, float]
    chosen: dict[str, Any]
    funnel: dict[int, float]


def cut_late(sequences: Sequences, share: float) -> Sequences:
    """Return the sequences without a share of each user's latest ratings.

    At least one rating is removed for users with two or more.
    """
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
    """The first stage trained on three windows, see the module docstring."""

    early: FirstStage
    trained: FirstStage
    last: FirstStage


def fit_first_stages(
    windows: Windows,
    settings: Settings,
    seed: int = 0,
    announce: Callable[[str], None] = lambda _: None,
) -> Stages:
    """Train the first stage three times; the number of epochs is tuned on validation.

    Raises:
        InputError: if `settings.candidates` is below the length of a list or above the
            number of movies.
    """
    catalogue = windows.catalogue
    check_candidates(settings.candidates, len(catalogue))

    def fitted(past: Sequences, **kwargs: Any) -> FirstStage:
        retrieval = fit_retrieval(past, catalogue, settings, seed=seed, **kwargs)
        return FirstStage(retrieval, past, catalogue, settings)

    announce("First stage: training window, epochs tuned on validation.")
    validation = Validation(windows.before_test, windows.validation_task)
    trained = fitted(windows.train, validation=validation)
    epochs = trained.retrieval.epochs
    announce(f"{epochs} epochs. Early ratings, then all before the test window.")
    early = fitted(cut_late(windows.train, settings.late), epochs=epochs)
    return Stages(early, trained, fitted(windows.before_test, epochs=epochs))


def run_second_stage(
    windows: Windows,
    stages: Stages,
    settings: Settings,
    seed: int = 0,
    announce: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train the ranker, tune on validation, and evaluate on the test window."""
    announce("Ranker: late training ratings, tuned on validation.")
    examples = examples_of(stages.early, windows.train, settings)
    tuner = _ValidationTuner(stages.trained, windows.validation_task)
    _, curves = fit_ranker(examples, settings, seed=seed, callbacks=[tuner])
    fusion, chosen = tuner.choose(settings)
    announce(f"{tuner.epochs} epochs, {fusion}. Final ranker: also on validation.")
    examples = examples.joined(
        examples_of(stages.trained, windows.before_test, settings)
    )
    ranker, _ = fit_ranker(examples, settings, seed=seed, epochs=tuner.epochs)
    metrics, funnel = measure(stages.last, ranker, fusion, windows.test_task)
    chosen |= {
        "retrieval_epochs": stages.trained.retrieval.epochs,
        "ranker_epochs": tuner.epochs,
        "fusion": fusion._asdict(),
        "curves": curves,
    }
    return Outcome(settings, stages.last, ranker, fusion, metrics, chosen, funnel)


def check_candidates(candidates: int, num_movies: int) -> None:
    """Raise InputError if the number of candidates is out of range."""
    if not LIST_LENGTH <= candidates <= num_movies:
        raise InputError(
            f"candidates must be from {LIST_LENGTH} (the length of a list) to "
            f"{num_movies:,} (the number of movies); got {candidates:,}"
        )


def examples_of(stage: FirstStage, until: Sequences, settings: Settings) -> Examples:
    """Return training examples from the ratings that follow those of a first stage.

    Args:
        stage: the first stage.
        until: the ratings it was trained on, followed by those of the window to train
            the ranker on.
        settings: number of next movies per example.
    """
    moments = Moments.between(stage.past, until, settings.block)
    return Examples.of(moments, *stage.candidates(until, moments.users, moments.ends))


class Ranked:
    """The candidates of a ranking task's users, with scores and lists.

    Args:
        stage: the first stage, trained on the movies that the users have seen.
        task: the ranking task.
    """

    def __init__(self, stage: FirstStage, task: RankingTask) -> None:
        self.task, self._genres = task, genre_vectors(stage.catalogue)
        lengths = stage.past.lengths[task.users]
        self.rows, *self._features = stage.candidates(stage.past, task.users, lengths)

    def predict(self, ranker: keras.Model) -> dict[str, np.ndarray]:
        """Return the scores (b, c) of each task."""
        scores = ranker.predict(self._features, batch_size=_BATCH_SIZE, verbose=0)
        return {task: scores[task].reshape(self.rows.shape) for task in TASKS}

    def lists(self, scores: dict[str, np.ndarray], fusion: Fusion) -> np.ndarray:
        """Return (b, k) catalogue rows, -1 where a list is shorter."""
        fused = np.where(self.rows < 0, MASKED_SCORE, np.asarray(fuse(scores, fusion)))
        top = diverse_top(
            keras.ops.convert_to_tensor(fused),
            keras.ops.convert_to_tensor(np.maximum(self.rows, 0)),
            keras.ops.convert_to_tensor(self._genres),
            LIST_LENGTH,
            fusion.diversity,
        )
        return np.take_along_axis(self.rows, np.asarray(top), axis=1)

    def ndcg(self, lists: np.ndarray) -> float:
        """Return the NDCG@k of lists (b, k), equal to that of `quality` but faster."""
        relevant = self.task.relevant[self.task.users]
        users = np.arange(len(lists))[:, None]
        hits = relevant[users, np.maximum(lists, 0)].toarray()
        discounts = 1 / np.log2(np.arange(2, 2 + lists.shape[1]))
        ideal_gains = np.cumsum(discounts)
        ideal = ideal_gains[np.minimum(relevant.getnnz(axis=1), lists.shape[1]) - 1]
        return float((hits * (lists >= 0) @ discounts / ideal).mean())

    def quality(self, lists: np.ndarray) -> dict[str, float]:
        """Return NDCG, recall, coverage and intra-list diversity at 10."""
        return {
            **rank(as_scorer(self.task, lists), self.task, LIST_LENGTH),
            "diversity@10": self.diversity(lists),
        }

    def diversity(self, lists: np.ndarray) -> float:
        """Return the intra-list diversity by genres."""
        return intra_list_diversity(lists, self._genres)


def as_scorer(task: RankingTask, lists: np.ndarray) -> Scorer:
    """Return a scorer of the catalogue whose ranking equals the lists (b, k).

    The lists are those of `task.users`, with -1 where a list is shorter.
    """
    size = task.relevant.shape[1]
    place = np.zeros(task.relevant.shape[0], int)
    place[task.users] = np.arange(len(task.users))

    def score(users: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(users), size + 1), np.float32)
        values = np.arange(lists.shape[1], 0, -1, dtype=np.float32)
        np.put_along_axis(scores, lists[place[users]], values[None], axis=1)
        return scores[:, :size]

    return score


class _ValidationTuner(keras.callbacks.Callback):
    """Ranks the validation window after every epoch; keeps the best scores."""

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
        """Return the best fusion weights, with the largest diversity in tolerance."""
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
    """Return the metrics of a ranking task, and recall by number of candidates."""
    past = stage.past
    everyone = np.arange(len(past.user_ids))
    catalogue_scores = stage.retrieval.scores(past.histories(stage.catalogue, everyone))

    def retrieval_scores(users: np.ndarray) -> np.ndarray:
        return catalogue_scores[users]

    ranked = Ranked(stage, task)
    scores = ranked.predict(ranker)
    final = ranked.quality(ranked.lists(scores, fusion))
    sorted_ = ranked.quality(ranked.lists(scores, fusion._replace(diversity=0.0)))
    first = ranked.quality(ranked.rows[:, :LIST_LENGTH])
    size = len(stage.catalogue)
    funnel = {
        k: rank(retrieval_scores, task, k)[f"recall@{k}"] for k in FUNNEL if k <= size
    }
    candidates = ranked.rows.shape[1]
    metrics = {
        **final,
        **{f"{name} without diversity": value for name, value in sorted_.items()},
        **{f"{name} of retrieval": value for name, value in first.items()},
        "recall@candidates": rank(retrieval_scores, task, candidates)[
            f"recall@{candidates}"
        ],
    }
    return metrics, funnel
