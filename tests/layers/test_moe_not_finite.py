"""NaN and infinity in tokens, router inputs and padding of MoE."""

import numpy as np
import pytest

from keras_moe.layers import HierarchicalMoE, MoE
from tests.support import backends, dispatches
from tests.support.checks import not_on_jax
from tests.support.moe_layers import (
    EXPERTS,
    OUTPUTS,
    WAYS,
    Call,
    D,
    E,
    U,
    array,
    layer_experts,
    moe,
    tokens,
)

BROKEN = [3, 8]
OTHERS = np.delete(np.arange(12), BROKEN)


def with_broken_rows(x):
    broken = x.copy()
    broken[3], broken[8, 0] = np.nan, np.inf
    return broken


def check_broken_rows(layer, names, **given):
    x = tokens(12)
    for way in names:
        layer.capacity_factor = float(E) if way == "capacity" else None
        if layer.router.choice == "expert":
            # Room for all, or one row less makes room for another.
            layer.capacity_factor = None
            layer.router.capacity_factor = 2.0
        layer.dispatch = dispatches.dispatch_of(way)
        with dispatches.chosen(way):
            wanted = array(layer(x, **given))
            found = array(layer(with_broken_rows(x), **given))
        np.testing.assert_allclose(
            found[OTHERS], wanted[OTHERS], **OUTPUTS, err_msg=way
        )
        assert not np.isfinite(found[3]).any()
        assert np.isfinite(wanted).all()


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "bias_balanced", "sinkhorn",
                                    "expert_choice", "hash", "dense"])  # fmt: skip
def test_a_row_that_is_not_finite_changes_no_other_row(router):
    ids = {"router_inputs": np.arange(12)} if router == "hash" else {}
    layer = moe(router, top_k=None if router == "dense" else 2)
    layer.build((12, D), *[(12,)] * len(ids))
    names = WAYS[layer.router.choice]
    check_broken_rows(layer, [name for name in names if name != "dropping"], **ids)


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "bias_balanced", "sinkhorn",
                                    "expert_choice", "dense"])  # fmt: skip
@pytest.mark.parametrize("broken", ["a row", "a column"])
def test_not_finite_router_inputs_in_every_dispatch(router, broken):
    """The experts see finite features. "dense" gave zeros for an expert choice."""
    layer = moe(router, top_k=None if router == "dense" else 2)
    x = tokens(12)
    layer.build((12, D), (12, D))
    seen = with_broken_rows(x) if broken == "a row" else x
    if broken == "a column":
        kernel = array(layer.router.kernel).copy()
        kernel[:, 1] = np.nan
        layer.router.kernel.assign(kernel)
    found = {}
    for way in WAYS[layer.router.choice]:
        if way == "dropping":
            continue
        layer.capacity_factor = float(E) if way == "capacity" else None
        if layer.router.choice == "expert":
            layer.capacity_factor = None
        layer.dispatch = dispatches.dispatch_of(way)
        with dispatches.chosen(way):
            found[way] = array(layer(x, router_inputs=seen))
    first = next(iter(found.values()))
    for way, outputs in found.items():
        np.testing.assert_allclose(outputs, first, **OUTPUTS, err_msg=way)
    if broken == "a row":
        assert np.isnan(first[3]).all()
        assert np.isfinite(first[OTHERS]).all()
    if router == "expert_choice":
        rows = BROKEN if broken == "a row" else np.arange(12)
        assert np.isnan(first[rows]).all()


WITH_PARTS = {
    "two levels": lambda: HierarchicalMoE(2, 2, (4, U), dtype="float64"),
    "GLU": lambda: moe(experts=EXPERTS["GLU"]()),
    "layers": lambda: moe(experts=layer_experts()),
    "shared experts": lambda: moe(num_shared_experts=2),
}


@not_on_jax
@pytest.mark.parametrize("name", WITH_PARTS)
def test_a_row_that_is_not_finite_changes_no_other_row_in_any_experts(name):
    layer = WITH_PARTS[name]()
    layer.build((12, D))
    names = dispatches.UNSTACKED if name == "layers" else dispatches.TOKEN_CHOICE
    check_broken_rows(layer, names)


COMPETING = {
    "position": ({"capacity_factor": 0.6, "priority": "position"}, False),
    "probability": ({"capacity_factor": 0.6, "priority": "probability"}, False),
    "expert_choice": ({"router": "expert_choice", "capacity_factor": 0.7}, False),
    "sinkhorn": ({"router": "sinkhorn"}, True),
}


@not_on_jax
@pytest.mark.parametrize("name", COMPETING)
def test_a_row_that_is_not_finite_counts_as_padding(name):
    options, training = COMPETING[name]
    layer, x = moe(**options), tokens(12)
    layer.build(x.shape)
    mask = np.ones(12, bool)
    mask[BROKEN] = False
    found = array(layer(with_broken_rows(x), training=training))
    wanted = array(layer(x, mask=mask, training=training))
    np.testing.assert_allclose(found[OTHERS], wanted[OTHERS], **OUTPUTS)
    assert not np.isfinite(found[BROKEN]).any()
    # They do compete: with all rows whole, some other has something else.
    whole = array(layer(x, training=training))
    assert not np.allclose(whole[OTHERS], wanted[OTHERS])


@pytest.mark.parametrize("way", dispatches.TOKEN_CHOICE)
@pytest.mark.parametrize("kind", ["three layers", "GLU", "layers"])
def test_nan_in_padding_reaches_no_output_or_gradient(kind, way):
    if kind == "layers" and way not in dispatches.UNSTACKED:
        pytest.skip("no kernels to multiply together")
    experts = EXPERTS[kind]()
    x, mask = tokens(2, 6), np.ones((2, 6), bool)
    mask[0, 3:] = mask[1, 0] = False
    x[~mask] = np.nan
    layer = MoE(
        E, experts=experts, dtype="float64", dispatch=dispatches.dispatch_of(way)
    )
    layer.build(x.shape)
    with dispatches.chosen(way):
        (outputs,), by_weight, (by_input,) = backends.outputs_and_gradients(
            Call(layer, mask=mask), [x], [np.ones((2, 6, U))]
        )
        layer(x, mask=mask)
    assert (outputs[~mask] == 0).all()
    assert np.isfinite(outputs).all()
    assert (by_input[~mask] == 0).all()
    for gradient in [*by_weight, by_input]:
        assert np.isfinite(gradient).all()
    assert all(np.isfinite(array(loss)) for loss in layer.losses)
