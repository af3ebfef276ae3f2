"""Sparse mixtures in eager mode of JAX: their loops are compiled once."""

import keras
import numpy as np
import pytest

from keras_moe.experts import GLUExperts, MLPExperts
from keras_moe.layers import MoE
from tests.support import dispatches

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX compiles eager loops"
)
LOOPS = ["in_turn", "evenly", "ragged"]
EXPERTS = {
    "MLP": lambda **kwargs: MLPExperts(4, (8, 3), **kwargs),
    "GLU": lambda **kwargs: GLUExperts(4, 8, 3, **kwargs),
}


def moe(way, experts):
    layer = MoE(experts=experts, top_k=2, dispatch=dispatches.dispatch_of(way))
    layer.build((None, 5))
    return layer


@pytest.fixture(scope="module")
def compilations():
    """A list that gets an entry for each program that XLA compiles."""
    import jax

    found = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    # JAX has no public way to remove it.
    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def gradients(layer, x):
    """Return the gradients of the sum of squares by the input and the weights."""
    import jax

    def loss(x, weights):
        outputs, _ = layer.stateless_call(
            weights, [w.value for w in layer.non_trainable_variables], x
        )
        return (outputs**2).sum()

    return jax.grad(loss, (0, 1))(x, [w.value for w in layer.trainable_variables])


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("way", LOOPS)
def test_a_second_call_compiles_nothing(way, kind, compilations):
    x = keras.random.normal((24, 5))
    with dispatches.chosen(way):
        layer = moe(way, EXPERTS[kind]())
        layer(x)
        gradients(layer, x)
        assert compilations
        compilations.clear()
        layer(x)
        gradients(layer, x)
        # Another layer of this form has the same programs.
        moe(way, EXPERTS[kind]())(x)
    assert not compilations


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "soft_sign"])
def test_so_with_activations_of_jax(name, compilations):
    import jax

    x = keras.random.normal((24, 5))
    layer = moe("ragged", EXPERTS["GLU"](activation=getattr(jax.nn, name)))
    layer(x)
    compilations.clear()
    layer(x)
    assert not compilations


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("way", LOOPS)
def test_new_weights_are_read(way, kind):
    """Outputs and gradients are those of "dense", before and after the change."""
    x = keras.random.normal((24, 5))
    with dispatches.chosen(way):
        layer = moe(way, EXPERTS[kind]())
        plain = moe("dense", EXPERTS[kind]())
        for _ in range(2):
            for w, other in zip(layer.weights, plain.weights, strict=True):
                w.assign(keras.random.normal(w.shape))
                other.assign(w)
            np.testing.assert_allclose(layer(x), plain(x), rtol=1e-4, atol=1e-4)
            found, wanted = gradients(layer, x), gradients(plain, x)
            for a, b in zip(
                keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


SLOPE = 1.0


def scaled(x):
    """An activation that reads more than its argument, without a closure."""
    return x * SLOPE


class Scaled:
    """An activation with a state; not hashable."""

    slope = 1.0
    __hash__ = None

    def __call__(self, x):
        return x * self.slope


@pytest.mark.parametrize(
    ("way", "kind"), [("ragged", "MLP"), ("ragged", "GLU"), ("evenly", "MLP")]
)
def test_an_activation_may_have_a_state(way, kind, monkeypatch):
    """Of a closure, of a module, of an object: the change is seen."""
    import jax

    slope, scaled_object = [1.0], Scaled()

    def closure(x):
        return x * slope[0]

    x = keras.random.normal((24, 5))
    activations = (closure, scaled, scaled_object, jax.tree_util.Partial(scaled))
    with dispatches.chosen(way):
        layers = [
            moe(way, EXPERTS[kind](activation=activation, use_bias=False))
            for activation in activations
        ]
        before = [layer(x) for layer in layers]
        slope[0] = scaled_object.slope = 2.0
        monkeypatch.setitem(globals(), "SLOPE", 2.0)
        for layer, outputs in zip(layers, before, strict=True):
            np.testing.assert_allclose(layer(x), 2.0 * outputs, rtol=1e-5)
