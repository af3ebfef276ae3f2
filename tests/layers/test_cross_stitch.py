"""CrossStitch against the NumPy oracle, by hand, and in its special cases."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.layers import CrossStitch, SharedBottom
from tests.support import backends, oracles, sharing_oracles
from tests.support.checks import not_on_jax

ORACLE = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)


def _randomised(layer):
    """Random values for every weight, biases too: all of them, then by kind."""
    rng = np.random.default_rng(1)
    values, kinds = [], {"kernel": [], "bias": [], "stitch": []}
    for variable in layer.trainable_variables:
        values.append(rng.normal(size=variable.shape))
        variable.assign(values[-1])
        kinds[variable.path.split("/")[-1].split("_")[0]].append(values[-1])
    return values, kinds["kernel"], kinds["bias"], kinds["stitch"]


def _arrays(outputs):
    return [ops.convert_to_numpy(o) for o in keras.tree.flatten(outputs)]


def _assert_equal(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("units", [(5,), (6, 5), (6, 4, 5)])
@pytest.mark.parametrize("per_unit", [False, True])
@pytest.mark.parametrize("tasks", [["a", "b"], ["a", "b", "c"]])
def test_outputs_and_all_gradients_equal_the_oracle(units, per_unit, tasks):
    layer = CrossStitch(units, tasks, per_unit=per_unit, dtype="float64")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3))
    layer.build(x.shape)
    values, *weights = _randomised(layer)
    cotangents = [rng.normal(size=(4, 5)) for _ in tasks]

    def oracle():
        return sharing_oracles.cross_stitch(x, *weights)

    _assert_equal(_arrays(layer(x)), oracle(), ORACLE)
    by_weight, by_input = backends.gradients(layer, [x], cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum((o * c).sum() for o, c in zip(oracle(), cotangents, strict=True)),
        [*values, x],
    )
    _assert_equal([*by_weight, *by_input], expected, GRADIENTS)


@not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    d=st.integers(1, 4),
    t=st.integers(2, 4),
    units=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    per_unit=st.booleans(),
)
def test_any_sizes_equal_the_oracle(n, d, t, units, per_unit):
    layer = CrossStitch(units, t, per_unit=per_unit, dtype="float64")
    x = np.random.default_rng(n).normal(size=(n, d))
    layer.build(x.shape)
    _, *weights = _randomised(layer)
    expected = sharing_oracles.cross_stitch(x, *weights)
    _assert_equal(_arrays(layer(x)), expected, ORACLE)


def test_further_leading_axes_are_rows():
    layer = CrossStitch((6, 5), 2, dtype="float64")
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    expected = [o.reshape((2, 4, 5)) for o in _arrays(layer(x.reshape((8, 3))))]
    _assert_equal(_arrays(layer(x)), expected, ORACLE)


def test_by_hand():
    """Tasks 2x and -x + 1, stitched by [[0.9, 0.1], [0.3, 0.7]].

    At x = 1 the tasks are 2 and 0: 0.9 * 2 = 1.8 and 0.3 * 2 = 0.6.
    At x = 0 they are 0 and 1: 0.1 and 0.7.
    """
    layer = CrossStitch(1, ["a", "b"], activation="linear", dtype="float64")
    x = np.array([[1.0], [0.0]])
    layer.build(x.shape)
    layer.towers.kernels[0].assign([[[2.0]], [[-1.0]]])
    layer.towers.biases[0].assign([[0.0], [1.0]])
    layer.stitches[0].assign([[0.9, 0.1], [0.3, 0.7]])
    outputs = layer(x)
    _assert_equal(_arrays(outputs["a"]), [[[1.8], [0.1]]], ORACLE)
    _assert_equal(_arrays(outputs["b"]), [[[0.6], [0.7]]], ORACLE)


@pytest.mark.parametrize("per_unit", [False, True])
def test_an_identity_leaves_separate_mlps(per_unit):
    """`self_weight=1` starts as one; a layer after another would show any mixing."""
    layer = CrossStitch((6, 5), 3, self_weight=1.0, per_unit=per_unit, dtype="float64")
    x = np.random.default_rng(0).normal(size=(4, 3))
    layer.build(x.shape)
    initial = [ops.convert_to_numpy(stitch) for stitch in layer.stitches]
    _, kernels, biases, _ = _randomised(layer)
    for stitch, value in zip(layer.stitches, initial, strict=True):
        stitch.assign(value)
    expected = sharing_oracles.separate_mlps(x, kernels, biases)
    _assert_equal(_arrays(layer(x)), expected, ORACLE)


def test_one_task_is_an_mlp():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    layer, bottom = CrossStitch((6, 4), 1), SharedBottom((6, 4), 1)
    expected, _ = layer(x), bottom(x)
    assert layer.stitches == []
    bottom.set_weights(layer.get_weights())
    _assert_equal(_arrays(bottom(x)), _arrays(expected), {"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("per_unit", [False, True])
def test_stitches_start_as_means(per_unit):
    layer = CrossStitch((6, 4), 3, self_weight=0.8, per_unit=per_unit)
    layer.build((None, 5))
    expected = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    for stitch, units in zip(layer.stitches, (6, 4), strict=True):
        found = ops.convert_to_numpy(stitch)
        assert found.shape == ((3, 3, units) if per_unit else (3, 3))
        wanted = np.stack([expected] * units, -1) if per_unit else expected
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_tasks_and_layers_start_different():
    initializer = keras.initializers.GlorotUniform(seed=1)
    layer = CrossStitch((8, 8), 2, kernel_initializer=initializer)
    layer.build((None, 8))
    draws = [
        part for kernel in layer.towers.kernels for part in ops.convert_to_numpy(kernel)
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not np.allclose(a, b)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graph"
)
@pytest.mark.parametrize("tasks", [2, 9])
def test_few_large_matmuls_however_many_tasks(tasks):
    """Two layers and two combinations: four, forward."""
    import tensorflow as tf

    layer = CrossStitch((8, 4), tasks)
    layer.build((None, 6))
    traced = tf.function(layer).get_concrete_function(tf.TensorSpec((None, 6)))
    kinds = [op.type for op in traced.graph.get_operations()]
    assert sum("MatMul" in kind for kind in kinds) == 4


def test_dropout_is_active_in_training_alone_and_follows_its_seed():
    x = np.ones((50, 6), "float32")
    layers = [CrossStitch((16, 4), 2, dropout=0.5, seed=3) for _ in range(2)]
    calm, _ = (layer(x) for layer in layers)
    layers[1].set_weights(layers[0].get_weights())
    first, second = (_arrays(layer(x, training=True)) for layer in layers)
    _assert_equal(first, second, {"rtol": 0})
    assert not np.allclose(first[0], _arrays(calm)[0])
    _assert_equal(_arrays(layers[0](x)), _arrays(calm), {"rtol": 0})


def test_a_row_of_nan_stays_in_its_row():
    layer = CrossStitch((4, 5), ["a", "b"])
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    expected = _arrays(layer(x))
    x[1] = np.nan
    for found, wanted in zip(_arrays(layer(x)), expected, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": ()}, "`units` must name at least one layer"),
        ({"units": (4, 0)}, r"`units\[1\]` must be .*0"),
        ({"tasks": 0}, "`tasks` must be an integer >= 1"),
        ({"tasks": ["a", "a"]}, "must be unique. Received 'a' more than once"),
        ({"self_weight": 1.1}, r"`self_weight` must be in \[0, 1\].*1\.1"),
        ({"self_weight": -0.1}, r"`self_weight` must be in \[0, 1\].*-0\.1"),
        ({"self_weight": float("nan")}, "`self_weight` must be a finite number.*nan"),
        ({"self_weight": "0.9"}, "`self_weight` must be a finite number.*'0.9'"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossStitch(**{"units": 4, "tasks": ["a", "b"], **arguments})


@pytest.mark.parametrize("shape", [(4,), (None, None)])
def test_inputs_without_a_feature_axis_are_refused(shape):
    with pytest.raises(ValueError, match="Received an input of shape"):
        CrossStitch(4, 2).build(shape)
