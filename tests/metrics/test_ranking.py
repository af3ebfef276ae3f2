"""AUC by ranks, by group and for regressions, against loops and scikit-learn."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.metrics import roc_auc_score

from keras_moe.metrics import GAUC, XAUC, ByGroup, RankAUC


def _value(metric):
    return float(ops.convert_to_numpy(metric.result()))


def _rare(n, seed=0):
    """Labels with a rate of 0.1%, and probabilities that are better than chance."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=n)
    labels = rng.uniform(size=n) < 1 / (1 + np.exp(7.4 - score))
    noisy = 0.8 * score - 8.5 + 0.5 * rng.normal(size=n)
    return labels.astype("float32"), (1 / (1 + np.exp(-noisy))).astype("float32")


@pytest.mark.parametrize("from_logits", [False, True])
def test_rank_auc_at_a_low_rate_is_the_exact_one_within_its_bound(from_logits):
    labels, probabilities = _rare(100_000)
    exact = roc_auc_score(labels, probabilities)
    assert 0 < labels.mean() < 0.002
    assert exact > 0.65
    scores = probabilities
    if from_logits:
        scores = np.log(probabilities) - np.log1p(-probabilities)
    metric = RankAUC(from_logits=from_logits)
    for start in range(0, len(labels), 20_000):
        rows = slice(start, start + 20_000)
        metric.update_state(labels[rows, None], scores[rows, None])
    bound = float(metric.error_bound())
    assert 0 < bound < 1e-3
    assert abs(_value(metric) - exact) <= bound + 1e-6
    # What Keras' thresholds of equal distance make of it.
    thresholds = keras.metrics.AUC()
    thresholds.update_state(labels, probabilities)
    assert abs(_value(thresholds) - exact) > 0.05


def test_rank_auc_of_few_bins_is_worse_than_its_bound_nowhere():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 500).astype("float32")
    scores = rng.uniform(0.01, 0.99, 500).astype("float32")
    exact = roc_auc_score(labels, scores)
    errors = []
    for bins in (2, 3, 10, 100):
        metric = RankAUC(num_bins=bins)
        metric.update_state(labels, scores)
        errors.append(abs(_value(metric) - exact))
        assert errors[-1] <= float(metric.error_bound()) + 1e-6
    assert errors[-1] < errors[0]


def test_rank_auc_with_weights_and_extreme_predictions():
    labels, scores = [1, 0, 1, 0, 0], [1.0, 0.0, 1e-30, 0.5, 0.25]
    weights = [2.0, 3.0, 1.0, 0.0, 1.0]
    metric = RankAUC()
    metric.update_state(labels, scores, weights)
    # Pairs: (1.0 > 0.0) 2 * 3, (1.0 > 0.25) 2 * 1; 1e-30 and 0.0 share the first bin:
    # 1 * 3 / 2; (1e-30 < 0.25) 0. (6 + 2 + 1.5) / (3 * 4)
    assert _value(metric) == pytest.approx(9.5 / 12)


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
@pytest.mark.parametrize("metric", [RankAUC, XAUC])
def test_without_pairs_it_is_not_a_number(metric, labels):
    metric = metric()
    metric.update_state(np.array(labels, "float32"), np.full(len(labels), 0.5))
    assert np.isnan(_value(metric))


def _gauc_by_loop(labels, scores, weights, groups, group_weight):
    total = norm = 0.0
    for group in np.unique(groups):
        inside = (groups == group) & (weights > 0)
        y, s, w = labels[inside], scores[inside], weights[inside]
        if len(np.unique(y)) < 2:
            continue
        auc = roc_auc_score(y, s, sample_weight=w)
        share = {"rows": w.sum(), "positives": w[y > 0].sum(), "uniform": 1.0}
        total += share[group_weight] * auc
        norm += share[group_weight]
    return total / norm


@pytest.mark.parametrize("group_weight", ["rows", "positives", "uniform"])
def test_gauc_is_a_loop_over_groups(group_weight):
    rng = np.random.default_rng(2)
    n = 400
    labels = rng.integers(0, 2, n).astype("float32")
    scores = np.round(rng.normal(size=n), 1).astype("float32")  # with ties
    weights = rng.integers(0, 3, n).astype("float32")
    groups = rng.integers(-3, 60, n)
    metric = GAUC(group_weight=group_weight, max_rows=n)
    for start in range(0, n, 64):
        rows = slice(start, start + 64)
        metric.update_state(
            labels[rows], scores[rows], weights[rows], groups=groups[rows]
        )
    expected = _gauc_by_loop(labels, scores, weights, groups, group_weight)
    assert _value(metric) == pytest.approx(expected, rel=1e-6)
    metric.reset_state()
    assert np.isnan(_value(metric))


def test_gauc_of_groups_of_one_class_is_not_a_number():
    metric = GAUC()
    metric.update_state([1, 1, 0], [0.1, 0.2, 0.3], groups=[0, 0, 1])
    assert np.isnan(_value(metric))


def test_more_rows_than_are_kept_give_nan_and_a_warning():
    metric = GAUC(max_rows=4)
    metric.update_state([1, 0, 1], [0.3, 0.2, 0.1], groups=[0, 0, 0])
    assert _value(metric) == 0.5
    metric.update_state([1, 0, 1], [0.3, 0.2, 0.1], groups=[0, 0, 0])
    with pytest.warns(UserWarning, match="seen 6 rows and keeps max_rows=4"):
        assert np.isnan(_value(metric))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_xauc_is_a_loop_over_pairs(n):
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 5, n).astype("float32")
    scores = np.round(labels * 0.3 + rng.normal(size=n), 1).astype("float32")
    weights = rng.integers(0, 3, n).astype("float32")
    won = all_pairs = 0.0
    for i, j in itertools.combinations(range(n), 2):
        if labels[i] != labels[j]:
            pair = weights[i] * weights[j]
            order = (labels[i] - labels[j]) * (scores[i] - scores[j])
            won += pair * (0.5 if order == 0 else order > 0)
            all_pairs += pair
    metric = XAUC(max_rows=n)
    metric.update_state(labels, scores, weights)
    if all_pairs == 0:
        assert np.isnan(_value(metric))
    else:
        assert _value(metric) == pytest.approx(won / all_pairs, rel=1e-6)


def test_xauc_of_two_classes_is_the_auc():
    labels, scores = _rare(3000, seed=3)
    labels[:20] = 1
    metric = XAUC()
    metric.update_state(labels, scores)
    assert _value(metric) == pytest.approx(roc_auc_score(labels, scores), rel=1e-5)


def test_lists_of_groups_have_the_ndcg_of_each_list():
    keras_rs = pytest.importorskip("keras_rs")
    rng = np.random.default_rng(5)
    n, k = 60, 3
    groups = rng.integers(0, 12, n)
    labels = rng.integers(0, 3, n).astype("float32")
    scores = rng.normal(size=n).astype("float32")
    metric = ByGroup(keras_rs.metrics.NDCG(k=k, name="ndcg"))
    metric.update_state(labels, scores, groups=groups)

    def dcg(gains):
        gains = np.array(gains)[:k]
        return ((2.0**gains - 1) / np.log2(np.arange(len(gains)) + 2)).sum()

    found = []
    for group in np.unique(groups):
        inside = groups == group
        gains = labels[inside][np.argsort(-scores[inside])]
        if gains.sum():
            found.append(dcg(gains) / dcg(np.sort(gains)[::-1]))
    assert metric.name == "ndcg"
    # Lists without a relevant row count as 0 in keras-rs.
    assert 0 < len(found) < len(np.unique(groups))
    assert _value(metric) == pytest.approx(
        sum(found) / len(np.unique(groups)), rel=1e-5
    )


@pytest.mark.parametrize("metric", [GAUC(), RankAUC(), XAUC()], ids=lambda m: m.name)
def test_rows_of_workers_are_merged(metric):
    labels, scores = _rare(2000, seed=6)
    labels[::50] = 1
    groups = np.arange(2000) % 7
    kind = type(metric)

    def of(rows):
        made = kind.from_config(metric.get_config())
        extra = {"groups": groups[rows]} if kind is GAUC else {}
        made.update_state(labels[rows], scores[rows], **extra)
        return made

    whole, *parts = of(slice(None)), of(slice(0, 900)), of(slice(900, None))
    parts[0].merge_state(parts[1:])
    assert _value(parts[0]) == pytest.approx(_value(whole), rel=1e-6)
