"""Normalized entropy, predicted over observed, and the calibration error."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.metrics import log_loss

from keras_moe.metrics import (
    PCOC,
    BySegment,
    ExpectedCalibrationError,
    NormalizedEntropy,
)


def _value(metric):
    return float(ops.convert_to_numpy(metric.result()))


def _data(n=5000, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n) - 2
    labels = rng.uniform(size=n) < 1 / (1 + np.exp(-logits))
    return labels.astype("float32"), (logits + 0.3).astype("float32")


@pytest.mark.parametrize("from_logits", [False, True])
def test_normalized_entropy_by_hand(from_logits):
    # One positive of four: H(1/4) = log 4 - 3/4 log 3 = 0.562335. Log losses: -log of
    # 0.5, 0.8, 0.8, 0.8: (0.693147 + 3 * 0.223144) / 4 = 0.340644.
    predictions = np.array([0.5, 0.2, 0.2, 0.2])
    if from_logits:
        predictions = np.log(predictions / (1 - predictions))
    metric = NormalizedEntropy(from_logits)
    metric.update_state([1, 0, 0, 0], predictions)
    assert _value(metric) == pytest.approx(0.340644 / 0.562335, rel=1e-5)


def test_normalized_entropy_of_weighted_batches():
    labels, logits = _data()
    weights = np.random.default_rng(1).uniform(size=len(labels)).astype("float32")
    probabilities = 1 / (1 + np.exp(-logits))
    rate = np.average(labels, weights=weights)
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    expected = log_loss(labels, probabilities, sample_weight=weights) / entropy
    for from_logits, predictions in ((True, logits), (False, probabilities)):
        metric = NormalizedEntropy(from_logits)
        for start in range(0, len(labels), 1000):
            rows = slice(start, start + 1000)
            metric.update_state(labels[rows], predictions[rows], weights[rows])
        assert _value(metric) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
def test_normalized_entropy_of_one_class_is_not_a_number(labels):
    metric = NormalizedEntropy()
    metric.update_state(np.array(labels, "float32"), np.full(len(labels), 0.25))
    assert np.isnan(_value(metric))


def test_rare_labels_keep_their_precision():
    # 1e-8 is far below the 1e-7 at which the losses of Keras clip.
    metric = NormalizedEntropy()
    metric.update_state([1, 0], [1e-8, 1e-8])
    expected = -np.log(1e-8) / 2 / np.log(2)
    assert _value(metric) == pytest.approx(expected, rel=1e-5)


def test_predicted_over_observed_with_weights():
    metric = PCOC()
    metric.update_state([1, 0, 1], [0.5, 0.2, 0.9], [2.0, 1.0, 0.0])
    assert _value(metric) == pytest.approx((2 * 0.5 + 0.2) / 2)
    metric.reset_state()
    metric.update_state([0, 0], [0.5, 0.2])
    assert np.isnan(_value(metric))


def test_calibration_error_by_hand():
    # Six rows in three bins of two: predictions 0.1 0.2 | 0.3 0.4 | 0.8 0.9,
    # observed 0 0 | 1 0 | 1 1: |0 - 0.15|, |0.5 - 0.35|, |1 - 0.85|.
    metric = ExpectedCalibrationError(num_bins=3)
    metric.update_state([1, 0, 0, 1, 0, 1], [0.9, 0.1, 0.4, 0.3, 0.2, 0.8])
    assert _value(metric) == pytest.approx(0.15, rel=1e-5)


def test_calibration_error_of_batches_is_that_of_sorted_rows():
    labels, logits = _data(20_000, seed=2)
    probabilities = 1 / (1 + np.exp(-logits))
    order = np.argsort(probabilities)
    expected = np.mean(
        [
            abs(labels[rows].mean() - probabilities[rows].mean())
            for rows in np.split(order, 10)
        ]
    )
    metric = ExpectedCalibrationError()
    for start in range(0, len(labels), 5000):
        rows = slice(start, start + 5000)
        metric.update_state(labels[rows], probabilities[rows])
    # The bins are not exactly of equal weight.
    assert _value(metric) == pytest.approx(expected, rel=0.02)
    assert expected > 0.02


def test_segments_have_their_own_figures():
    labels, logits = _data(600)
    segments = np.arange(600) % 3
    metric = BySegment(PCOC(from_logits=True), ["a", "b"])
    metric.update_state(labels, logits, groups=segments)
    for k, name in enumerate(["pcoc_a", "pcoc_b"]):
        alone = PCOC(from_logits=True)
        alone.update_state(labels[segments == k], logits[segments == k])
        assert float(metric.result()[name]) == pytest.approx(_value(alone), rel=1e-6)
    metric.reset_state()
    assert np.isnan(float(metric.result()["pcoc_a"]))


@pytest.mark.parametrize(
    "metric",
    [NormalizedEntropy, PCOC, ExpectedCalibrationError],
    ids=lambda kind: kind.__name__,
)
def test_undefined_rows_change_no_bit(metric):
    labels, logits = _data(64, seed=4)
    probabilities = 1 / (1 + np.exp(-logits))
    weights = np.append(np.ones(60), np.zeros(4))
    metric, same = metric(), metric()
    metric.update_state(labels, probabilities, weights)
    undefined = np.array([np.nan, np.inf, -np.inf, 1.0], "float32")
    labels[60:], probabilities[60:] = undefined, undefined[::-1]
    same.update_state(labels, probabilities, weights)
    assert _value(metric) == _value(same)


def test_a_nan_prediction_that_counts_is_seen():
    for metric in (NormalizedEntropy(), PCOC()):
        metric.update_state([1, 0], [np.nan, 0.5])
        assert np.isnan(_value(metric))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"`y_true` must have the shape.*\(3,\)"):
        PCOC().update_state([1, 0, 1], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"`sample_weight` must have the shape"):
        PCOC().update_state([1, 0], [0.5, 0.5], [1.0, 1.0, 1.0])


def test_padding_of_a_sequence_does_not_count():
    inputs = keras.Input((3,), dtype="int32")
    embedded = keras.layers.Embedding(5, 1, mask_zero=True)(inputs)
    model = keras.Model(inputs, embedded)
    predictions = model(np.array([[1, 2, 0], [3, 0, 0]]))
    metric = PCOC()
    metric.update_state(np.ones((2, 3, 1)), predictions)
    values = ops.convert_to_numpy(predictions)[..., 0]
    expected = (values[0, 0] + values[0, 1] + values[1, 0]) / 3
    assert _value(metric) == pytest.approx(float(expected), rel=1e-5)
