"""What a layer cannot take is named by the layer and argument that the user wrote."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import routers
from keras_moe.layers import DSelectK, HoME, MoE, PEPNet
from tests.support.checks import not_on_jax
from tests.support.layer_cases import CASES

every_layer = pytest.mark.parametrize(
    "case",
    # One case a class: the variants share the code.
    {type(case.layer()): case for case in reversed(CASES)}.values(),
    ids=lambda case: case.name,
)
every_router = pytest.mark.parametrize("name", routers.KNOWN)


def _first_input(layer):
    return next(iter(inspect.signature(layer.call).parameters))


def _message(layer, *inputs):
    with pytest.raises(ValueError, match=r"(?s).*") as error:
        layer(*inputs)
    message = str(error.value)
    assert message.startswith(f"{type(layer).__name__} expects"), message
    assert "\n" not in message
    return message


def _with_first(case, first):
    return [first, *case.inputs(2)[1:]]


@every_layer
@pytest.mark.parametrize("built", [False, True])
@not_on_jax
def test_what_is_no_tensor_of_numbers_is_named(case, built):
    layer = case.layer()
    if built:
        layer(*case.inputs(2))
    name = _first_input(layer)
    x = case.inputs(2)[0]
    message = _message(layer, *_with_first(case, {"click": x, "buy": x}))
    assert f"`{name}`" in message
    assert "dict with the keys ['buy', 'click']" in message
    message = _message(layer, *_with_first(case, [x, x]))
    assert f"{name} is a list of 2" in message
    message = _message(layer, *_with_first(case, np.array([["a", "b"]])))
    assert "keras.layers.StringLookup" in message
    message = _message(layer, *_with_first(case, x.ravel()[:6]))
    assert f"`{name}` of rank >= {layer.least_rank}" in message
    assert "(6,)" in message
    assert f"{name}=None" in _message(layer, *_with_first(case, None))


@every_router
def test_what_is_no_tensor_of_numbers_is_named_by_routers(name):
    for value, words in (
        ({"a": np.ones((2, 3))}, "dict with the keys ['a']"),
        (np.array([["a"]]), "keras.layers.StringLookup"),
    ):
        message = _message(routers.KNOWN[name](4), value)
        assert "`tokens`" in message
        assert words in message


@every_layer
def test_ragged_and_string_tensors_are_named(case):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has them")
    import tensorflow as tf

    layer = case.layer()
    x = case.inputs(5)[0]
    ragged = tf.RaggedTensor.from_row_lengths(x, [2, 3])
    assert "`to_tensor()`" in _message(layer, *_with_first(case, ragged))
    text = tf.constant([["a", "b"]])
    assert "of dtype string" in _message(layer, *_with_first(case, text))
    symbolic = keras.Input((6,), dtype="string")
    assert "of dtype string" in _message(layer, *_with_first(case, symbolic))


def test_a_further_input_is_named():
    layer = PEPNet(5, ["a"])
    message = _message(layer, np.ones((2, 6)), np.array([["Rome"], ["Oslo"]]))
    assert "`domain_inputs`" in message
    moe = MoE(4, 5, router="hash")
    with pytest.raises(ValueError, match="MoE expects numbers as `router_inputs`"):
        moe(np.ones((2, 6)), router_inputs=np.array(["a", "b"]))


@every_layer
@not_on_jax
def test_a_shape_of_rank_1_is_named_in_build(case):
    layer = case.layer()
    shapes = [(6,), *[(None, *shape) for shape in case.shapes[1:]]]
    with pytest.raises(ValueError, match=rf"^{type(layer).__name__} expects inputs"):
        layer.build(*shapes)


@every_layer
@not_on_jax
def test_whole_numbers_are_numbers(case):
    layer = case.layer()
    layer(*case.inputs(2))
    whole = [np.round(3 * x) for x in case.inputs(4)]
    expected = keras.tree.flatten(layer(*whole))
    found = keras.tree.flatten(layer(*[x.astype("int32") for x in whole]))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-4, atol=1e-5
        )


def test_an_attached_mask_is_found_beside_a_second_input():
    """On JAX it is no attribute of the tensor, and padding was routed."""
    inputs = keras.Input((3, 6))
    masked = keras.layers.Masking()(inputs)
    seen = keras.layers.Masking()(keras.Input((3, 6)))
    moe = MoE(4, 5, top_k=2, router="top_k")
    model = keras.Model(
        [inputs, seen._keras_history.operation.input], moe(masked, router_inputs=seen)
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("float32")
    x[:, 2] = 0.0
    found = ops.convert_to_numpy(model([x, x + 1.0]))
    assert (found[:, 2] == 0).all()
    assert (found[:, :2] != 0).any()


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda: DSelectK(5, 5, 2, entropy_weight=0.1), "losses"),
        (lambda: HoME(1, 1, 5, 2), "outputs"),
    ],
    ids=["DSelectK", "HoME"],
)
def test_an_attached_mask_is_found(make, changes):
    """What stands in the masked steps changes nothing for the others."""
    inputs = keras.Input((3, 6))
    layer = make()
    outputs = layer(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, outputs)
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("float32")
    x[:, 2] = 0.0
    found = model(x, training=True)
    masked = [float(ops.convert_to_numpy(loss)) for loss in model.losses]
    if changes == "losses":
        layer(x[:, :2], training=True)
        of_two = [float(ops.convert_to_numpy(loss)) for loss in layer.losses]
        np.testing.assert_allclose(masked, of_two, rtol=1e-5)
    else:
        of_two = layer(x[:, :2], training=True)
        for a, b in zip(found, of_two, strict=True):
            np.testing.assert_allclose(
                ops.convert_to_numpy(a)[:, :2],
                ops.convert_to_numpy(b),
                rtol=1e-4,
                atol=1e-5,
            )
