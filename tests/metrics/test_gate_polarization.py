"""The share of rows and gates where one expert has nearly all of the weight."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MMoE
from keras_moe.metrics import GatePolarization
from tests.support.checks import rows


def _result(metric):
    return {k: float(ops.convert_to_numpy(v)) for k, v in metric.result().items()}


# Largest shares: 0.95 and 0.5 in row 0, 0.8 and 1 in row 1.
WEIGHTS = np.array(
    [[[0.95, 0.05, 0.0], [0.5, 0.3, 0.2]], [[0.1, 0.8, 0.1], [0.0, 0.0, 0.25]]]
)


def test_by_hand():
    """At 0.9 two of four gates are polarized; the mean share is 3.25 / 4."""
    metric = GatePolarization()
    metric.update_state(WEIGHTS)
    expected = {
        "gate_polarization": 0.5,
        "gate_polarization_largest_share": 3.25 / 4,
    }
    assert _result(metric) == pytest.approx(expected)
    lower = GatePolarization(threshold=0.75, name="low")
    lower.update_state(WEIGHTS)
    assert _result(lower)["low"] == pytest.approx(0.75)


def test_batches_add_up_and_a_mask_excludes_rows():
    metric = GatePolarization()
    metric.update_state(WEIGHTS[:1], mask=np.array([True]))
    metric.update_state(WEIGHTS, mask=np.array([False, True]))
    assert _result(metric)["gate_polarization"] == pytest.approx(0.5)
    sequence = GatePolarization()
    sequence.update_state(WEIGHTS[None], mask=np.array([[True, False]]))
    assert _result(sequence)["gate_polarization_largest_share"] == pytest.approx(
        (0.95 + 0.5) / 2
    )


def test_rows_without_finite_weights_do_not_count():
    broken = np.concatenate([WEIGHTS, np.full((1, 2, 3), np.nan), np.zeros((1, 2, 3))])
    metric, clean = GatePolarization(), GatePolarization()
    metric.update_state(broken)
    clean.update_state(WEIGHTS)
    assert _result(metric) == _result(clean)


def test_without_a_row_it_is_nan():
    metric = GatePolarization()
    metric.update_state(WEIGHTS[:0])
    assert all(np.isnan(value) for value in _result(metric).values())


def test_a_low_temperature_polarizes_the_gates_of_a_layer():
    x = rows(50, 6).astype("float32")
    soft = MMoE(4, 2, 2, gate_temperature=10.0)
    sharp = MMoE(4, 2, 2, gate_temperature=0.01)
    soft(x), sharp(x)
    found = []
    for layer in (soft, sharp):
        metric = GatePolarization()
        metric.update_state(layer.gate_weights(x))
        found.append(_result(metric)["gate_polarization"])
    assert found[0] == 0.0
    assert found[1] > 0.9


def test_a_config_round_trip():
    metric = GatePolarization(0.8, name="gates")
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(metric)
    )
    assert again.get_config() == {"threshold": 0.8, "name": "gates"}


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\).*1\.0"):
        GatePolarization(threshold=1.0)
    with pytest.raises(ValueError, match=r"`gate_weights` must have the shape"):
        GatePolarization().update_state(np.ones(3))
    with pytest.raises(ValueError, match=r"`mask` must have the shape"):
        GatePolarization().update_state(WEIGHTS, mask=np.ones(3, bool))
