import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.initializers import PerExpert


def _draw(initializer, shape, **kwargs):
    return ops.convert_to_numpy(PerExpert(initializer, **kwargs)(shape, "float32"))


def test_true_fans():
    """Glorot uniform of (300, 100) is bounded by sqrt(6 / 400), however many."""
    limit = np.sqrt(6 / 400)
    for experts in (1, 8):
        kernel = _draw("glorot_uniform", (experts, 300, 100))
        assert 0.99 * limit < np.abs(kernel).max() <= limit


def test_he_normal_has_the_standard_deviation_of_one_layer():
    kernel = _draw("he_normal", (8, 200, 50))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 200), rtol=0.02)


@pytest.mark.parametrize(
    "initializer",
    [
        "glorot_uniform",
        keras.initializers.GlorotUniform(seed=3),
        keras.initializers.Orthogonal(seed=3),
        keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3)),
    ],
)
def test_no_two_experts_alike(initializer):
    kernel = _draw(initializer, (4, 5, 6))
    for i in range(4):
        for j in range(i):
            assert not np.allclose(kernel[i], kernel[j])


def test_a_seed_repeats_and_a_stream_differs():
    seeded = keras.initializers.GlorotUniform(seed=3)
    first, again = _draw(seeded, (2, 3, 4)), _draw(seeded, (2, 3, 4))
    np.testing.assert_array_equal(first, again)
    other = _draw(seeded, (2, 3, 4), stream=1)
    assert not np.allclose(first, other)
    assert not np.allclose(first[0], other[1])


def test_without_randomness_and_plain_functions():
    np.testing.assert_array_equal(_draw("ones", (2, 3)), np.ones((2, 3)))
    counted = _draw(lambda shape, dtype: ops.ones(shape, dtype) * 2, (2, 3))
    np.testing.assert_array_equal(counted, 2 * np.ones((2, 3)))


def test_round_trip():
    config = PerExpert(keras.initializers.HeNormal(seed=1), stream=2).get_config()
    again = PerExpert.from_config(config)
    assert again.get_config() == config


def test_none_is_refused():
    with pytest.raises(ValueError, match="`initializer` must not be None"):
        PerExpert(None)
