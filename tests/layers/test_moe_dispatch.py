"""The argument `dispatch` of MoE: changes after training, capacities, `ragged`."""

import numpy as np
import pytest

from keras_moe.layers import MoE
from tests.support import dispatches
from tests.support.moe_layers import OUTPUTS, D, E, U, array, moe, tokens


@pytest.mark.parametrize("way", dispatches.TOKEN_CHOICE)
def test_the_dispatch_may_be_changed_after_training(way):
    layer, x = moe(), tokens(9)
    expected = array(layer(x))
    weights = [array(w) for w in layer.weights]
    layer.capacity_factor = float(E) if way == "capacity" else None
    layer.dispatch = dispatches.dispatch_of(way)
    with dispatches.chosen(way):
        np.testing.assert_allclose(array(layer(x)), expected, **OUTPUTS)
    for a, b in zip(layer.weights, weights, strict=True):
        assert (array(a) == b).all()
    again = MoE.from_config(layer.get_config())
    assert again.dispatch == dispatches.dispatch_of(way)
    again.build(x.shape)
    again.set_weights(weights)
    with dispatches.chosen(way):
        np.testing.assert_allclose(array(again(x)), expected, **OUTPUTS)


def test_auto_keeps_a_capacity_if_all_experts_are_chosen():
    layer, x = moe(num_experts=2, top_k=2, capacity_factor=0.5), tokens(8)
    layer.build(x.shape)
    layer.router.kernel.assign(np.zeros((D, 2)))
    # c = 0.5 * 2 * 8 / 2 = 4: the last four tokens find both experts full.
    found = array(layer(x)).any(axis=1)
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]


def test_the_capacity_by_default_is_a_quarter_above_an_even_load():
    layer, x = moe(top_k=1, dispatch="capacity", activation="tanh"), tokens(16)
    layer.build(x.shape)
    layer.router.kernel.assign(np.zeros((D, E)))
    # All tokens want expert 0, which has c = 1.25 * 1 * 16 / 4 = 5 slots.
    assert np.flatnonzero(array(layer(x)).any(axis=1)).tolist() == [0, 1, 2, 3, 4]
    # Tokens that are not finite want it too, but push nobody out.
    x[[0, 3]] = np.nan
    found = array(layer(x))
    assert np.isnan(found[[0, 3]]).all()
    whole = np.nan_to_num(found).any(axis=1)
    assert np.flatnonzero(whole).tolist() == [1, 2, 4, 5, 6]


def test_a_dispatch_that_does_not_fit_is_refused_later_too():
    layer = MoE(E, U, capacity_factor=1.5)
    with pytest.raises(ValueError, match=r"`capacity_factor`.*dispatch='dense'"):
        layer.dispatch = "dense"
    assert layer.dispatch == "auto"
    with pytest.raises(ValueError, match=r"`capacity_factor`.*-3"):
        layer.capacity_factor = -3
    assert layer.capacity_factor == 1.5
    layer.capacity_factor = None
    layer.dispatch = "dense"


@pytest.mark.skipif(dispatches.BACKEND == "jax", reason="there it is allowed")
def test_ragged_is_refused_off_jax():
    with pytest.raises(ValueError, match=r"'ragged' only on.*'jax'"):
        MoE(E, U, dispatch="ragged")
