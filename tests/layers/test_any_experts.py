"""Every layer of the family takes experts of any kind, and any names of tasks."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.experts import LayerExperts
from keras_moe.layers import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    CrossStitch,
    DSelectK,
    HoME,
    MMoE,
    OMoE,
    PPNet,
    SharedBottom,
)
from tests.support import checks

pytestmark = checks.not_on_jax
D, U = 6, 4

# Made with `units` of its own experts, or with `experts`; and the number a level.
MIXTURES = {
    "OMoE": (lambda units, t, **given: OMoE(3, units, t, **given), [3]),
    "MMoE": (lambda units, t, **given: MMoE(3, units, t, **given), [3]),
    "MMoE, top 2": (lambda units, t, **given: MMoE(3, units, t, top_k=2, **given), [3]),
    "CGC": (lambda units, t, **given: CGC(1, 1, units, t, **given), [3]),
    "PLE": (lambda units, t, **given: PLE(2, 1, 1, units, t, **given), [3, 3]),
    "AdaTT": (lambda units, t, **given: AdaTT(2, 1, units, t, **given), [2, 2]),
    "STEM": (lambda units, t, **given: STEM(1, 1, units, t, **given), [3]),
    "DSelectK": (lambda units, t, **given: DSelectK(4, units, t, **given), [4]),
}
FIXED = {
    "SharedBottom": lambda units, t: SharedBottom(units, t),
    "CrossStitch": lambda units, t: CrossStitch(units, t),
    "HoME": lambda units, t: HoME(1, 1, units, t),
    "PPNet": lambda units, t: PPNet(units, t),
}


def _inputs(layer):
    """Rows, and what else some layers are called with."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, D)).astype("float32")
    if isinstance(layer, STEM):
        return x, rng.normal(size=(5, 2, D)).astype("float32")
    if isinstance(layer, PPNet):
        return x, rng.normal(size=(5, 3)).astype("float32")
    return (x,)


def _outputs(layer):
    return [ops.convert_to_numpy(y) for y in keras.tree.flatten(layer(*_inputs(layer)))]


def _levels(layer):
    experts = layer.experts
    return list(experts) if isinstance(experts, list | tuple) else [experts]


def _beside_experts(layer):
    own = {id(v) for level in _levels(layer) for v in level.variables}
    return [v for v in layer.variables if id(v) not in own]


@pytest.mark.parametrize("name", MIXTURES)
def test_given_layers_are_mixed_as_the_layers_own_experts(name):
    make, counts = MIXTURES[name]
    layer = make(U, 2)
    expected = _outputs(layer)
    given = [
        LayerExperts([keras.layers.Dense(U, "relu") for _ in range(count)])
        for count in counts
    ]
    other = make(None, 2, experts=given if len(given) > 1 else given[0])
    other(*_inputs(other))
    for ours, theirs in zip(_levels(layer), given, strict=True):
        for k, dense in enumerate(theirs.layers):
            dense.set_weights([ours.kernels[0][k], ours.biases[0][k]])
    for variable, value in zip(
        _beside_experts(other), _beside_experts(layer), strict=True
    ):
        variable.assign(value)
    for found, wanted in zip(_outputs(other), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert np.abs(wanted).max() > 0


@pytest.mark.parametrize("name", [*MIXTURES, *FIXED])
def test_names_of_tasks_change_nothing(name):
    """No task takes what belongs to another whose name begins with its own."""
    make = MIXTURES[name][0] if name in MIXTURES else FIXED[name]
    counted, named = make(U, 2), make(U, ["like_x", "like"])
    first = _outputs(counted)
    named(*_inputs(named))
    named.set_weights(counted.get_weights())
    found = named(*_inputs(named))
    assert list(found) == ["like_x", "like"]
    for task, wanted in zip(found, first, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(found[task]), wanted, rtol=1e-5, atol=1e-6
        )
