"""Normalization by scenario against the NumPy oracle and by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import PartitionedNormalization
from tests.support import backends, checks, scenario_oracles
from tests.support.checks import array, rows

# Scenario 1 has one row, 3 none; -1 and 7 are unknown.
IDS = np.array([0, 2, -1, 0, 2, 1, 7, 2, 0])


def _built(p=4, **options):
    layer = PartitionedNormalization(p, dtype="float64", **options)
    layer.build((None, 3))
    values = checks.randomised(layer)
    return layer, values, [values[id(w)] for w in layer.trainable_variables]


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_all_gradients_equal_the_oracle(training):
    layer, values, weights = _built()
    x, statistics = rows(len(IDS), 3), None
    if not training:
        statistics = rows(5, 3, seed=4), np.exp(rows(5, 3, seed=5))
        layer.moving_mean.assign(statistics[0])
        layer.moving_variance.assign(statistics[1])

    def expected():
        return [scenario_oracles.partitioned_normalization(x, IDS, weights, statistics)]

    checks.check(layer, [x], expected, values, scenario=IDS, training=training)


def test_averages_by_hand():
    """Rows 1 and 3 of scenario 0 have the mean 2 and the variance 1, 7 of scenario 1 a
    variance of 0, and all rows, 9 of an unknown one too, the mean 5 and the variance
    (16 + 4 + 4 + 16) / 4 = 10. At a momentum of 0.75 averages, which start at 0 and 1,
    move by a quarter; scenario 2 has no row and keeps them.
    """
    layer = PartitionedNormalization(3, momentum=0.75, dtype="float64")
    x = np.array([[1.0], [3.0], [7.0], [9.0]])
    found = array(layer(x, np.array([0, 0, 1, 3]), training=True))
    scale = np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(found[:3, 0], [-1 / scale, 1 / scale, 0], rtol=1e-6)
    np.testing.assert_allclose(found[3, 0], 4 / np.sqrt(10 + 1e-3), rtol=1e-6)
    means = [0.5, 1.75, 0.0, 1.25]
    variances = [1.0, 0.75, 1.0, 0.75 + 2.5]
    np.testing.assert_allclose(array(layer.moving_mean)[:, 0], means, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance)[:, 0], variances, rtol=1e-6)


def test_a_mask_excludes_rows_from_the_moments():
    x = rows(len(IDS), 3)
    broken = x.copy()
    broken[3] = np.nan
    kept = np.arange(len(IDS)) != 3
    layer, _, _ = _built()
    twin, _, _ = _built()
    found = array(layer(broken, IDS, mask=kept, training=True))[kept]
    wanted = array(twin(x[kept], IDS[kept], training=True))
    np.testing.assert_allclose(found, wanted, **checks.OUTPUTS)
    for a, b in zip(layer.weights, twin.weights, strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="compiled by TensorFlow"
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_compiled_step_equals_an_eager_one(jit):
    import tensorflow as tf

    layer, _, _ = _built()
    twin, _, _ = _built()
    x = rows(len(IDS), 3)

    def step(normalization, x):
        with tf.GradientTape() as tape:
            outputs = normalization(x, IDS, training=True)
            loss = tf.reduce_sum(outputs * tf.cos(outputs))
        weights = [w.value for w in normalization.trainable_variables]
        return [outputs, *map(tf.convert_to_tensor, tape.gradient(loss, weights))]

    found = tf.function(step, jit_compile=jit)(layer, tf.constant(x))
    for a, b in zip(found, step(twin, tf.constant(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(layer.weights, twin.weights, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-9, atol=1e-11)


@checks.not_on_jax
def test_one_scenario_is_batch_normalization():
    x, ids = rows(8, 3), np.zeros(8, int)
    layer = PartitionedNormalization(1, dtype="float64")
    twin = keras.layers.BatchNormalization(dtype="float64")
    for training in (True, True, False):
        found = array(layer(x, ids, training=training))
        wanted = array(twin(x, training=training))
        np.testing.assert_allclose(found, wanted, **backends.tolerance(1e-5, 1e-6))


@checks.not_on_jax
def test_a_frozen_layer_keeps_its_averages():
    layer, _, _ = _built()
    layer.trainable = False
    before = [array(w).copy() for w in layer.weights]
    layer(rows(len(IDS), 3), IDS, training=True)
    for a, b in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(array(a), b)


@checks.not_on_jax
def test_fit_learns_moments_of_each_scenario_and_a_file_keeps_them(tmp_path):
    inputs, ids = keras.Input((2,)), keras.Input((), dtype="int32")
    layer = PartitionedNormalization(2, momentum=0.5)
    model = keras.Model([inputs, ids], layer(inputs, ids))
    model.compile("sgd", "mse")
    scenario = np.arange(64) % 2
    x = (rows(64, 2) + 5.0 * scenario[:, None]).astype("float32")
    model.fit([x, scenario], x, epochs=10, batch_size=64, verbose=0)
    mean = array(layer.moving_mean)
    for p in range(2):
        np.testing.assert_allclose(mean[p], x[scenario == p].mean(axis=0), atol=0.02)
    np.testing.assert_allclose(mean[2], x.mean(axis=0), atol=0.02)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        array(again([x, scenario])), array(model([x, scenario]))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_scenarios": 0}, "`num_scenarios` must be an integer >= 1.*0"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\).*1\.0"),
        ({"epsilon": 0.0}, "`epsilon` must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PartitionedNormalization(**{"num_scenarios": 2, **arguments})


def test_bad_scenarios_are_named():
    layer = PartitionedNormalization(2)
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"`scenario` must hold integers.*float"):
        layer(x, np.zeros(4))
    with pytest.raises(ValueError, match=r"`scenario` must have the leading axes"):
        layer(x, np.zeros((4, 1), int))
    with pytest.raises(ValueError, match=r"`scenario` must have the leading axes"):
        layer(x, np.zeros(3, int))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
@checks.not_on_jax
def test_ids_of_any_integer_type_are_taken(dtype):
    """300 scenarios do not fit in 8 bits, and 2^32 + 1 not in 32."""
    layer = PartitionedNormalization(300)
    layer.build((None, 2))
    layer.scenario_beta.assign(np.arange(300.0)[:, None] * np.ones((1, 2)))
    ids = [0, 1, 100]
    if dtype == "int64":
        ids += [299, 2**32 + 1, -(2**33)]
    x = ops.zeros((len(ids), 2))
    found = array(layer(x, np.array(ids, dtype)))[:, 0]
    np.testing.assert_allclose(found, [i if 0 <= i < 300 else 0 for i in ids])
