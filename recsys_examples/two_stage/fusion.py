"""From predictions to a list: weighted score fusion, then maximal marginal relevance.

    fused(m)  = watch(m) + like_weight * log p_like(m) + rating_weight * stars(m)
    next      = argmax over the rest of  fused(m) - diversity * max likeness(m, listed)

The second line is Carbonell and Goldstein 1998 (https://doi.org/10.1145/290941.291025)
with the weight on one side only, so that `diversity` is in units of the score: 0 sorts
by `fused`. Likeness is the cosine of two movies' genres.

Axis letters: b batch, c candidates, k places of the list, i movies, g genres.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

_SHORTLIST = 50  # candidates that the list is chosen from


class Fusion(NamedTuple):
    """How predictions become a list.

    Attributes:
        like: weight of the log probability of like; watch has 1.
        rating: weight of the stars.
        diversity: what full likeness to a movie of the list costs.
    """

    like: float = 1.0
    rating: float = 0.0
    diversity: float = 0.0


def fuse(scores: dict[str, Any], fusion: Fusion) -> Any:
    """Return (b, c) fused scores of the tasks' scores (b, c)."""
    return (
        scores["watch"]
        + fusion.like * tf.math.log_sigmoid(scores["like"])
        + fusion.rating * scores["rating"]
    )


def diverse_top(fused: Any, rows: Any, vectors: Any, k: int, diversity: float) -> Any:
    """Choose a list by maximal marginal relevance.

    Args:
        fused: (b, c) scores.
        rows: (b, c) the candidates' rows of `vectors`.
        vectors: (i, g) of length 1 or 0, whose product is the likeness.
        k: length of the list, at most c.
        diversity: see `Fusion`.

    Returns:
        (b, k) positions among the candidates, in the order of choice.
    """
    if diversity == 0.0:
        return tf.math.top_k(fused, k).indices
    size = min(fused.shape[1] or _SHORTLIST, max(k, _SHORTLIST))
    value, shortlist = tf.math.top_k(fused, size)
    genres = tf.gather(vectors, tf.gather(rows, shortlist, batch_dims=1))
    likeness = diversity * tf.matmul(genres, genres, transpose_b=True)
    penalty = tf.zeros_like(value)
    chosen = []
    for _ in range(k):
        place = tf.argmax(value - penalty, axis=1, output_type=tf.int32)
        chosen.append(place)
        penalty = tf.maximum(penalty, tf.gather(likeness, place, batch_dims=1))
        value = tf.where(tf.one_hot(place, size, True, False), value.dtype.min, value)
    return tf.gather(shortlist, tf.stack(chosen, axis=1), batch_dims=1)


def intra_list_diversity(lists: np.ndarray, vectors: np.ndarray) -> float:
    """Return 1 - likeness, averaged over the pairs of each list, then over lists.

    Args:
        lists: (b, k) rows of `vectors`.
        vectors: (i, g) of length 1 or 0.
    """
    listed = vectors[lists]
    likeness = listed @ listed.transpose(0, 2, 1)
    k = lists.shape[1]
    pairs = k * (k - 1)
    alike = likeness.sum(axis=(1, 2)) - np.trace(likeness, axis1=1, axis2=2)
    return float(1.0 - (alike / pairs).mean()) if pairs else 0.0
