"""Metrics of a ranking of the whole catalogue.

Protocol: for each user, the candidates are all movies not rated before the window, and
the relevant ones are the window's movies rated 4 or more. Users without a relevant
movie are excluded. All metrics except coverage are means over users.

Axis letters: b users of a batch, u users, i movies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.metrics import ndcg_score, roc_auc_score

from recsys_examples.movielens.features import Catalogue, Sequences

LIKED = 4.0  # smallest rating that counts as liked, in stars
# Score of seen movies, below all others; sklearn's ndcg_score accepts no infinity.
_SEEN = np.finfo(np.float32).min
# (b,) user rows -> (b, i) scores, higher is better
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RankingTask:
    """The ranking problem of one time window.

    Attributes:
        seen: (u, i) sparse, the movies rated before the window, which are excluded.
        relevant: (u, i) sparse, the window's movies that the user liked.
    """

    seen: sparse.csr_matrix
    relevant: sparse.csr_matrix

    @classmethod
    def from_window(
        cls, before: Sequences, window: pd.DataFrame, catalogue: Catalogue
    ) -> RankingTask:
        """Build the task from the ratings before a window and those in it."""
        liked = window[window.rating >= LIKED]
        after = Sequences.from_ratings(liked, catalogue, before.user_ids)
        size = len(catalogue)
        return cls(seen=before.matrix(size), relevant=after.matrix(size))

    @property
    def users(self) -> np.ndarray:
        """The rows of the users with a relevant movie."""
        return np.flatnonzero(self.relevant.getnnz(axis=1))


def top_movies(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k best movies (b, k) of scores (b, i), best first; all if i < k."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def rank(
    scorer: Scorer, task: RankingTask, k: int = 10, batch_size: int = 256
) -> dict[str, float]:
    """Rank the catalogue for every user of a task; return metrics.

    Args:
        scorer: function that returns the scores of all movies for a batch of users.
        task: the ranking task.
        k: length of the list.
        batch_size: number of users per batch, which bounds the memory.

    Returns:
        `ndcg@k`, `recall@k` (fraction of the relevant movies in the list) and
        `coverage@k` (fraction of the catalogue in any list).
    """
    ndcg, recall = [], []
    listed = np.zeros(task.relevant.shape[1], bool)
    for start in range(0, len(task.users), batch_size):
        users = task.users[start : start + batch_size]
        scores = np.where(task.seen[users].toarray() > 0, _SEEN, scorer(users))
        relevant = task.relevant[users].toarray()
        top = top_movies(scores, k)
        hits = np.take_along_axis(relevant, top, 1).sum(1)
        recall.extend(hits / relevant.sum(1))
        mean = ndcg_score(relevant, scores, k=k, ignore_ties=True)
        ndcg.extend([mean] * len(users))
        # If fewer than k movies are unseen, the list is shorter.
        listed[top[np.take_along_axis(scores, top, 1) > _SEEN]] = True
    return {
        f"ndcg@{k}": float(np.mean(ndcg)),
        f"recall@{k}": float(np.mean(recall)),
        f"coverage@{k}": float(listed.mean()),
    }


def group_auc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the AUC within users, averaged over users weighted by number of rows.

    Users with rows of one class only are excluded, as in Zhou et al., 2018: Deep
    Interest Network (https://arxiv.org/abs/1706.06978), section 6.
    """
    rows = pd.DataFrame({"user": users, "label": labels, "score": scores})
    per_user = [
        (roc_auc_score(group.label, group.score), len(group))
        for _, group in rows.groupby("user")
        if group.label.nunique() == 2
    ]
    if not per_user:
        return float("nan")
    values, weights = zip(*per_user, strict=True)
    return float(np.average(values, weights=weights))
