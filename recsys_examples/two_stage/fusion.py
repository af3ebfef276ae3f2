"""Weighted score fusion, then re-ranking by maximal marginal relevance.

    fused(m)  = watch(m) + like_weight * log p_like(m) + rating_weight * stars(m)
    next      = argmax over the rest of  fused(m) - diversity * max sim(m, listed)

The second line is Carbonell and Goldstein 1998 (https://doi.org/10.1145/290941.291025)
with a weight on the similarity only: `diversity` is in units of the score, and 0 sorts
by `fused`. sim, the similarity of two movies, is the cosine of their genre vectors.

Axis letters: b batch, c candidates, k places of the list, i movies, g genres.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

SCORE_MEANING = (
    "score = watch (log odds) + a ln p(like) + b rating, with a and b tuned on "
    "validation; the list is in the order of the score, less a penalty for movies "
    "with the genres of those above."
)
_SHORTLIST = 50  # number of best candidates that are re-ranked


class Fusion(NamedTuple):
    """Weights of the score fusion and of the re-ranking.

    Attributes:
        like: weight of log p(like); the weight of the watch score is 1.
        rating: weight of the stars.
        diversity: penalty for a similarity of 1 to a movie of the list.
    """

    like: float = 1.0
    rating: float = 0.0
    diversity: float = 0.0


def fuse(scores: dict[str, Any], fusion: Fusion) -> Any:
    """Return the fused scores (b, c) of the scores of the tasks (b, c)."""
    return (
        scores["watch"]
        + fusion.like * tf.math.log_sigmoid(scores["like"])
        + fusion.rating * scores["rating"]
    )


def diverse_top(fused: Any, rows: Any, vectors: Any, k: int, diversity: float) -> Any:
    """Select a list by maximal marginal relevance.

    Args:
        fused: (b, c) scores.
        rows: (b, c) rows of the candidates in `vectors`.
        vectors: (i, g) genre vectors of norm 1 or 0; their product is the similarity.
        k: length of the list, at most c.
        diversity: see `Fusion`.

    Returns:
        (b, k) positions among the candidates, in the order of selection.
    """
    if diversity == 0.0:
        return tf.math.top_k(fused, k).indices
    size = min(fused.shape[1] or _SHORTLIST, max(k, _SHORTLIST))
    value, shortlist = tf.math.top_k(fused, size)
    genres = tf.gather(vectors, tf.gather(rows, shortlist, batch_dims=1))
    similarity = diversity * tf.matmul(genres, genres, transpose_b=True)
    penalty = tf.zeros_like(value)
    chosen = []
    for _ in range(k):
        place = tf.argmax(value - penalty, axis=1, output_type=tf.int32)
        chosen.append(place)
        penalty = tf.maximum(penalty, tf.gather(similarity, place, batch_dims=1))
        value = tf.where(tf.one_hot(place, size, True, False), value.dtype.min, value)
    return tf.gather(shortlist, tf.stack(chosen, axis=1), batch_dims=1)


def intra_list_diversity(lists: np.ndarray, vectors: np.ndarray) -> float:
    """Return 1 - similarity, averaged over the pairs of each list, then over lists.

    Args:
        lists: (b, k) rows of `vectors`.
        vectors: (i, g) genre vectors of norm 1 or 0.
    """
    listed = vectors[lists]
    similarity = listed @ listed.transpose(0, 2, 1)
    k = lists.shape[1]
    pairs = k * (k - 1)
    total = similarity.sum(axis=(1, 2)) - np.trace(similarity, axis1=1, axis2=2)
    return float(1.0 - (total / pairs).mean()) if pairs else 0.0
