import numpy as np
import pytest
from keras import ops

from keras_moe.experts import MLPExperts
from tests import backends, oracles


@pytest.mark.parametrize("units", [(4,), (6, 4), (6, 5, 4)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_each_expert_alone(units, use_bias):
    experts = MLPExperts(3, units, use_bias=use_bias, dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 2))
    experts(x)
    rng = np.random.default_rng(1)
    for bias in experts.biases:
        bias.assign(rng.normal(size=bias.shape))
    expected = oracles.mlp_experts(
        x,
        [ops.convert_to_numpy(k) for k in experts.kernels],
        [ops.convert_to_numpy(b) for b in experts.biases],
    )
    found = ops.convert_to_numpy(experts(x))
    np.testing.assert_allclose(found, expected, **backends.tolerance(1e-9))


def test_leading_axes_are_kept():
    experts = MLPExperts(3, (6, 4))
    x = np.random.default_rng(0).normal(size=(2, 5, 7)).astype("float32")
    together = ops.convert_to_numpy(experts(x))
    assert together.shape == (2, 5, 3, 4)
    alone = ops.convert_to_numpy(experts(x[1]))
    np.testing.assert_allclose(together[1], alone, rtol=1e-5, atol=1e-6)


def test_dropout_leaves_the_output_layer_whole():
    """With one layer there is nothing to drop; with two there is."""
    x = np.ones((4, 3), "float32")
    for units, changes in [((8,), False), ((8, 8), True)]:
        experts = MLPExperts(2, units, dropout=0.5, seed=0)
        still = ops.convert_to_numpy(experts(x))
        moved = ops.convert_to_numpy(experts(x, training=True))
        assert np.allclose(still, moved) is not changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "`num_experts`"),
        ({"num_experts": True}, "`num_experts`.*True"),
        ({"units": ()}, "`units` must name at least one layer"),
        ({"dropout": 2}, "`dropout`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLPExperts(**{"num_experts": 2, "units": (4,), **arguments})
