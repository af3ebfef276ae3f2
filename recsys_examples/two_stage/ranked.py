"""Lists of the pipeline for the users of a window, and how good they are.

Axis letters: b users, c candidates, k length of a list.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from recsys_examples.movielens.ranking import RankingTask, Scorer, rank
from recsys_examples.two_stage.first_stage import BATCH_SIZE, FirstStage
from recsys_examples.two_stage.fusion import (
    Fusion,
    diverse_top,
    fuse,
    intra_list_diversity,
)
from recsys_examples.two_stage.settings import LIST_LENGTH, TASKS, Settings
from recsys_examples.two_stage.statistics import genre_vectors
from recsys_examples.two_stage.towers import MASKED_SCORE

FUNNEL = (10, 20, 50, 100, 200, 500, 1000)


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
        scores = ranker.predict(self._features, batch_size=BATCH_SIZE, verbose=0)
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


class ValidationTuner(keras.callbacks.Callback):
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
