import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MMoE, Tower
from tests.support import backends, oracles


def test_is_an_mlp_that_ends_in_one_unit():
    tower = Tower((6, 4), dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 3))
    found = ops.convert_to_numpy(tower(x))
    layers = [*tower.hidden, tower.output_unit]
    kernels = [ops.convert_to_numpy(layer.kernel) for layer in layers]
    biases = [np.zeros(kernel.shape[1]) for kernel in kernels]
    expected = oracles.mlp(x, kernels, biases, oracles.relu, oracles.linear)
    np.testing.assert_allclose(found, expected, **backends.tolerance(1e-9))


def test_output_bias_starts_where_it_is_told():
    tower = Tower((4,), bias_initializer=keras.initializers.Constant(-1.5))
    assert ops.convert_to_numpy(tower(np.zeros((1, 3)))) == -1.5


def test_seeded_layers_of_one_size_start_different():
    tower = Tower((4, 4), kernel_initializer=keras.initializers.HeNormal(seed=0))
    tower.build((None, 4))
    first, second = [ops.convert_to_numpy(layer.kernel) for layer in tower.hidden]
    assert not np.allclose(first, second)


def test_dropout_is_only_for_training():
    tower = Tower((64,), dropout=0.5, seed=0)
    x = np.ones((2, 3), "float32")
    still = ops.convert_to_numpy(tower(x))
    assert not np.allclose(ops.convert_to_numpy(tower(x, training=True)), still)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": (0,)}, r"`units\[0\]` must be an integer >= 1"),
        ({"units": None}, "`units` must be an integer or a sequence"),
        ({"units": 4, "dropout": 1.5}, r"`dropout` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tower(**arguments)


def test_the_outputs_of_all_tasks_are_refused():
    shared = MMoE(2, 4, ["click", "buy"])(keras.Input((3,)))
    with pytest.raises(ValueError, match=r"Tower expects one tensor.*'buy', 'click'"):
        Tower((4,))(shared)
