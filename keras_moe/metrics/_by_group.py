"""Ranking within groups: a ranker is judged by the lists of its users.

Axis letters: r rows, g groups, l rows of the longest group.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.metrics._buffer import BufferedMetric, Kept

_GROUP_WEIGHTS = ("rows", "positives", "uniform")


@keras.saving.register_keras_serializable("keras_moe")
class GAUC(BufferedMetric):
    """The AUC within each group, such as a user, averaged over the groups.

    `GAUC = sum_g w_g AUC_g / sum_g w_g` over the groups that have positive and negative
    rows; the others have no AUC and are left out. Exact.

    Args:
        group: str, name of the feature in `x` that holds the group of a row, an integer
            id; it need not be an input of the model. A `MultiTaskModel` passes it;
            elsewhere call `update_state` with `groups`.
        group_weight: w_g: "rows" (the weight of the group's rows, the impressions of
            Zhou et al.), "positives" or "uniform".
        max_rows: int, the number of rows of an epoch that are kept (16 bytes each).
            Above it the result is NaN, with a warning.
        name: str, name of the metric.

    Call arguments:
        y_true: labels of 0 and 1, `(n,)` or `(n, 1)`.
        y_pred: probabilities, logits or other scores; only their order counts.
        sample_weight: weights of the rows; those of weight 0 are left out.
        groups: integers of shape `(n,)`.

    Returns:
        A scalar. NaN if no group has both kinds of rows, and within compiled steps:
        `fit` and `evaluate` show it at the end of an epoch.

    Raises:
        ValueError: if an argument is invalid, shapes differ, or `groups` is missing.

    Example:

    >>> metric = keras_moe.metrics.GAUC()
    >>> labels, scores = [1, 0, 1, 0, 0], [0.9, 0.8, 0.1, 0.2, 0.05]
    >>> metric.update_state(labels, scores, groups=[7, 7, 8, 8, 8])
    >>> round(float(metric.result()), 6)  # (2 * 1 + 3 * 0.5) / 5
    0.7

    References:
        - [Zhu et al., 2017: Optimized Cost per Click in Taobao Display Advertising](
          https://arxiv.org/abs/1703.02091)
        - [Zhou et al., 2018: Deep Interest Network for Click-Through Rate Prediction](
          https://arxiv.org/abs/1706.06978), equation 10
    """

    def __init__(
        self,
        group: str | None = None,
        group_weight: str = "rows",
        max_rows: int = 2**18,
        name: str = "gauc",
    ) -> None:
        super().__init__(max_rows, group, name)
        self.group_weight = _checks.one_of("group_weight", group_weight, _GROUP_WEIGHTS)

    def value_of(self, kept: Kept) -> float:
        if not len(kept.groups):
            return float("nan")
        positive = kept.weights.astype("float64") * kept.labels
        negative = kept.weights.astype("float64") - positive
        order = np.lexsort((kept.predictions, kept.groups))
        groups, scores = kept.groups[order], kept.predictions[order]
        new_group = np.append(True, groups[1:] != groups[:-1])
        new_score = new_group | np.append(True, scores[1:] != scores[:-1])
        ties = np.flatnonzero(new_score)  # the first row of each block of equal scores
        blocks = np.flatnonzero(new_group[ties])  # the first block of each group
        p = np.add.reduceat(positive[order], ties)
        n = np.add.reduceat(negative[order], ties)
        below = np.cumsum(n) - n
        group_of_block = np.cumsum(new_group[ties]) - 1
        below = below - below[blocks][group_of_block]
        won = np.add.reduceat(p * (below + n / 2.0), blocks)
        p, n = np.add.reduceat(p, blocks), np.add.reduceat(n, blocks)
        both = (p > 0.0) & (n > 0.0)
        if not both.any():
            return float("nan")
        won, p, n = won[both], p[both], n[both]
        weights = {"rows": p + n, "positives": p, "uniform": np.ones_like(p)}
        return float(np.average(won / (p * n), weights=weights[self.group_weight]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "group_weight": self.group_weight}


@keras.saving.register_keras_serializable("keras_moe")
class XAUC(BufferedMetric):
    """The share of pairs of rows that predictions put in the order of the labels.

    The AUC of a regression, such as a watch time: over all pairs of rows with different
    labels, the weighted share in which the larger label has the larger prediction;
    equal predictions count one half. With labels of 0 and 1 it is the AUC. Exact, in
    O(r log² r).

    Args:
        max_rows: int, the number of rows of an epoch that are kept (16 bytes each).
            Above it the result is NaN, with a warning.
        name: str, name of the metric.

    Returns:
        A scalar. NaN if all labels are equal, and within compiled steps: `fit` and
        `evaluate` show it at the end of an epoch.

    Raises:
        ValueError: if an argument is invalid or the shapes differ.

    Example:

    >>> metric = keras_moe.metrics.XAUC()
    >>> metric.update_state([1.0, 2.0, 3.0], [0.1, 0.9, 0.5])
    >>> round(float(metric.result()), 6)  # 2 of 3 pairs
    0.666667

    References:
        - [Zhan et al., 2022: Deconfounding Duration Bias in Watch-time Prediction for
          Video Recommendation](https://arxiv.org/abs/2206.06003)
    """

    needs_groups = False

    def __init__(self, max_rows: int = 2**18, name: str = "xauc") -> None:
        super().__init__(max_rows, None, name)

    def value_of(self, kept: Kept) -> float:
        weights = kept.weights.astype("float64")
        labels, scores = kept.labels, kept.predictions
        # Within equal labels the scores fall, and no pair of them counts as in order.
        order = np.lexsort((-scores, labels))
        in_order = _ordered_pairs(scores[order], weights[order])
        different = _pairs(weights) - _equal_pairs(weights, labels)
        if different <= 0.0:
            return float("nan")
        tied = _equal_pairs(weights, scores) - _equal_pairs(weights, labels, scores)
        return float((in_order + tied / 2.0) / different)

    def get_config(self) -> dict[str, Any]:
        return {"max_rows": self.max_rows, "name": self.name}


@keras.saving.register_keras_serializable("keras_moe")
class ByGroup(BufferedMetric):
    """A metric of lists, such as NDCG of keras-rs, over the lists of the groups.

    Rows come one by one, in any order and batch; the metric gets one list per group.

    Args:
        metric: a metric with `update_state(y_true, y_pred, sample_weight)` of lists,
            `(g, l)`, in which shorter lists are padded with labels of -1 and weights of
            0, as in `keras_rs.metrics`. It is used by this metric alone.
        group: str, name of the feature in `x` that holds the group of a row, an integer
            id; it need not be an input of the model. A `MultiTaskModel` passes it;
            elsewhere call `update_state` with `groups`.
        max_rows: int, the number of rows of an epoch that are kept (16 bytes each).
            Above it the result is NaN, with a warning.
        name: str, name of the metric. Default: that of `metric`.

    Returns:
        The result of `metric`. NaN without a counted row, and within compiled steps:
        `fit` and `evaluate` show it at the end of an epoch.

    Raises:
        ValueError: if an argument is invalid, shapes differ, or `groups` is missing.

    Example:

    >>> import keras_rs
    >>> ndcg = keras_rs.metrics.NDCG(k=2, name="ndcg_at_2")
    >>> metric = keras_moe.metrics.ByGroup(ndcg)
    >>> metric.update_state([1, 0, 0, 1], [0.9, 0.1, 0.8, 0.2], groups=[3, 3, 4, 4])
    >>> round(float(metric.result()), 4)  # (1 + 1 / log2(3)) / 2
    0.8155
    """

    def __init__(
        self,
        metric: keras.metrics.Metric,
        group: str | None = None,
        max_rows: int = 2**18,
        name: str | None = None,
    ) -> None:
        metric = _checks.metric("metric", metric)
        super().__init__(max_rows, group, metric.name if name is None else name)
        # In a config, not as an attribute: Keras would make it part of this state.
        self._config = keras.saving.serialize_keras_object(metric)

    def value_of(self, kept: Kept) -> float:
        if not len(kept.groups):
            return float("nan")
        metric = keras.saving.deserialize_keras_object(self._config)
        order = np.argsort(kept.groups, kind="stable")
        _, first, sizes = np.unique(
            kept.groups[order], return_index=True, return_counts=True
        )
        # Lists of one length at a time, so that no padding is the largest part.
        for length in np.unique(_powers_of_two(sizes)):
            chosen = np.flatnonzero(_powers_of_two(sizes) == length)
            places = first[chosen, None] + np.arange(length)
            inside = np.arange(length) < sizes[chosen, None]
            rows = order[np.minimum(places, len(order) - 1)]
            metric.update_state(
                np.where(inside, kept.labels[rows], -1.0).astype("float32"),
                np.where(inside, kept.predictions[rows], 0.0).astype("float32"),
                np.where(inside, kept.weights[rows], 0.0).astype("float32"),
            )
        return float(ops.convert_to_numpy(metric.result()))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "metric": self._config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ByGroup:
        metric = keras.saving.deserialize_keras_object(config["metric"])
        return cls(**{**config, "metric": metric})


def _powers_of_two(sizes: np.ndarray) -> np.ndarray:
    """Return the smallest power of two that is not below each size."""
    return 2 ** np.ceil(np.log2(sizes)).astype("int64")


def _pairs(weights: np.ndarray) -> float:
    """Return the sum of w_i w_j over the pairs i < j."""
    return float((weights.sum() ** 2 - (weights**2).sum()) / 2.0)


def _equal_pairs(weights: np.ndarray, *keys: np.ndarray) -> float:
    """Return the sum of w_i w_j over the pairs that are equal in all keys."""
    if not len(weights):
        return 0.0
    order = np.lexsort(keys)
    changes = np.zeros(len(order), bool)
    changes[0] = True
    for key in keys:
        ordered = key[order]
        changes[1:] |= ordered[1:] != ordered[:-1]
    first = np.flatnonzero(changes)
    sums = np.add.reduceat(weights[order], first)
    squares = np.add.reduceat(weights[order] ** 2, first)
    return float((sums**2 - squares).sum() / 2.0)


def _ordered_pairs(scores: np.ndarray, weights: np.ndarray) -> float:
    """Return the sum of w_i w_j over the pairs i < j with scores_i < scores_j.

    A merge sort from blocks of one row to one block of all: the pairs of a left and a
    right half are counted while both halves are sorted.
    """
    n = len(scores)
    size = 1 << max(n - 1, 0).bit_length()
    ranks = np.unique(scores, return_inverse=True)[1]
    padded = np.full(size, n, "int64")  # Padding has weight 0 and counts for nothing.
    padded[:n] = ranks
    w = np.zeros(size)
    w[:n] = weights
    total, half = 0.0, 1
    while half < size:
        blocks, block_weights = padded.reshape(-1, 2 * half), w.reshape(-1, 2 * half)
        left, right = blocks[:, :half], blocks[:, half:]
        # One search for all blocks: each has its own range of keys.
        offset = np.arange(len(blocks))[:, None] * (n + 1)
        below = np.searchsorted((left + offset).ravel(), (right + offset).ravel())
        cumulative = np.append(0.0, np.cumsum(block_weights[:, :half].ravel()))
        start = np.repeat(np.arange(len(blocks)) * half, half)
        lighter = cumulative[below] - cumulative[start]
        total += float(lighter @ block_weights[:, half:].ravel())
        order = np.argsort(blocks, axis=1, kind="stable")
        padded = np.take_along_axis(blocks, order, axis=1).ravel()
        w = np.take_along_axis(block_weights, order, axis=1).ravel()
        half *= 2
    return total
