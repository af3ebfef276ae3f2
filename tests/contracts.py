"""What every layer of keras_moe promises, in functions that a test runs over all.

A `Case` says how to make a layer and what to feed it. Adding a layer to the library
means adding its cases to `tests/support/layer_cases.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from tests.support import backends

ROWS = 5  # Mostly the same number, since JAX compiles every operation for every shape.


@dataclass(frozen=True)
class Case:
    """One layer, ready to make, and the feature shapes of its inputs."""

    name: str
    make: Callable[..., keras.layers.Layer]
    shapes: tuple[tuple[int, ...], ...] = ((6,),)
    float32_output: bool = False
    rows_compete: bool = False  # For places in experts, so a batch is not its rows.
    scenarios: int = 0  # If not 0, the last input, of shape (), is ids below it.
    kwargs: dict = field(default_factory=dict)

    def layer(self, **kwargs) -> keras.layers.Layer:
        return self.make(**self.kwargs, **kwargs)

    def built(self, **kwargs) -> keras.layers.Layer:
        layer = self.layer(**kwargs)
        layer.build(*[(None, *shape) for shape in self.shapes])
        return layer

    def inputs(self, *leading: int, dtype="float32") -> list[np.ndarray]:
        rng = np.random.default_rng(7)
        return [
            rng.integers(self.scenarios, size=leading).astype(kind)
            if kind == "int32"
            else rng.normal(size=(*leading, *shape)).astype(dtype)
            for shape, kind in zip(self.shapes, self.dtypes, strict=True)
        ]

    @property
    def dtypes(self) -> list[str]:
        """The type of each input."""
        given = ["float32"] * len(self.shapes)
        return [*given[:-1], "int32"] if self.scenarios else given

    def symbolic(self) -> list[keras.KerasTensor]:
        return [
            keras.Input(shape, dtype=dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def model(self, layer) -> keras.Model:
        inputs = self.symbolic()
        return keras.Model(inputs, layer(*inputs))


class Call(keras.layers.Layer):
    """A built layer that is called with its inputs and, each time, with `given`."""

    def __init__(self, layer, **given):
        super().__init__(dtype=layer.dtype_policy)
        self.layer, self.given = layer, given
        self.built = True

    def call(self, *inputs):
        return self.layer(*inputs, **self.given)


def flat(outputs) -> list[np.ndarray]:
    return [
        ops.convert_to_numpy(ops.cast(o, "float32"))
        for o in keras.tree.flatten(outputs)
    ]


def assert_same(actual, expected, atol=1e-5, rtol=1e-4) -> None:
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=rtol)


def config_round_trip(case: Case) -> None:
    layer = case.layer(name="given", trainable=False)
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert keras.saving.serialize_keras_object(again) == config
    assert config["registered_name"].startswith("keras_moe>")
    assert again.name == "given"
    assert not again.trainable


def file_round_trip(case: Case, tmp_path) -> None:
    model = case.model(case.layer())
    path = tmp_path / "model.keras"
    model.save(path)
    inputs = case.inputs(ROWS)
    again = keras.models.load_model(path)
    assert_same(again(inputs), model(inputs), atol=0)


def output_shape(case: Case) -> None:
    for leading in [(4,), (4, 3)]:
        layer = case.layer()
        inputs = case.inputs(*leading)
        found = keras.tree.map_structure(lambda o: tuple(o.shape), layer(*inputs))
        assert found == layer.compute_output_shape(*[x.shape for x in inputs])
    symbolic = case.layer()(*case.symbolic())
    for tensor in keras.tree.flatten(symbolic):
        assert tensor.shape[0] is None
        assert None not in tensor.shape[1:]


def dtype_policy(case: Case, policy: str) -> None:
    reference, layer = case.built(), case.built(dtype=policy)
    inputs = case.inputs(ROWS)
    layer.set_weights(reference.get_weights())
    expected, outputs = reference(*inputs), backends.call(layer, *inputs)
    dtype = "float32" if case.float32_output else layer.compute_dtype
    for output in keras.tree.flatten(outputs):
        assert keras.backend.standardize_dtype(output.dtype) == dtype
    for variable in layer.trainable_variables:
        assert variable.dtype == "float32"
    # Processors round half precision in their own order: a few units in the last place.
    epsilon = ml_dtypes.finfo(layer.compute_dtype).eps
    assert_same(outputs, expected, atol=0.05, rtol=4 * float(epsilon))


def compiled_equals_eager(case: Case) -> None:
    layer = case.layer()
    inputs = case.inputs(ROWS)
    expected = layer(*inputs)
    calls = backends.compiled_calls(layer)
    if not calls:
        pytest.skip("this backend is not compiled here")
    for call in calls.values():
        assert_same(call(*[ops.convert_to_tensor(x) for x in inputs]), expected)


def any_batch_size(case: Case) -> None:
    layer = case.layer()
    model = case.model(layer)
    rows = case.inputs(7)
    expected = flat(layer(*rows))
    if case.rows_compete:
        found = flat(model.predict(rows, verbose=0))
        assert_same(found, expected)
        assert model.predict([x[:1] for x in rows], verbose=0).shape[0] == 1
        return
    for size in (1, 3, 7):
        found = flat(model.predict([x[:size] for x in rows], verbose=0))
        assert_same(found, [o[:size] for o in expected])


def gradients_reach_every_weight(case: Case) -> None:
    layer = case.built()
    inputs = case.inputs(32)
    shapes = layer.compute_output_shape(*[x.shape for x in inputs])
    outputs = keras.tree.flatten(keras.tree.map_shape_structure(np.zeros, shapes))
    rng = np.random.default_rng(3)
    cotangents = [rng.normal(size=o.shape).astype("float32") for o in outputs]
    call = layer
    if case.scenarios:  # Ids have no gradient.
        call = Call(layer, scenario=inputs.pop())
    by_weight, by_input = backends.gradients(call, inputs, cotangents)
    assert by_weight
    for variable, gradient in zip(layer.trainable_variables, by_weight, strict=True):
        assert np.isfinite(gradient).all(), variable.path
        # Along the first axis of a stacked weight lie the experts, or the gates.
        for part in gradient if gradient.ndim > 1 else [gradient]:
            assert np.abs(part).max() > 0, variable.path
    for gradient in by_input:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def deterministic_in_inference(case: Case) -> None:
    layer = case.layer()
    inputs = case.inputs(ROWS)
    first = layer(*inputs, training=False)
    assert_same(layer(*inputs, training=False), first, atol=0)
    assert_same(layer(*inputs), first, atol=0)


def mask_is_passed_on(case: Case) -> None:
    layer = case.layer()
    inputs = [ops.convert_to_tensor(x) for x in case.inputs(2, 3)]
    mask = ops.convert_to_tensor(np.array([[True, True, False], [True, False, False]]))
    layer(*inputs)
    found = layer.compute_mask(inputs[0], mask)
    assert layer.supports_masking
    for part in keras.tree.flatten(found):
        assert (ops.convert_to_numpy(part) == ops.convert_to_numpy(mask)).all()
    assert layer.compute_mask(inputs[0], None) is None


def another_width_is_refused(case: Case) -> None:
    layer = case.built()
    for factor in (2, 3):
        wider = [
            np.concatenate([x] * factor, axis=-1) if x.ndim > 1 else x
            for x in case.inputs(4)
        ]
        with pytest.raises(ValueError, match="axis -1"):
            layer(*wider)


def no_rows(case: Case) -> None:
    for output in flat(backends.call(case.built(), *case.inputs(0))):
        assert output.shape[0] == 0


PROMISES = {
    promise.__name__: promise
    for promise in (
        config_round_trip,
        output_shape,
        compiled_equals_eager,
        any_batch_size,
        gradients_reach_every_weight,
        deterministic_in_inference,
        mask_is_passed_on,
        another_width_is_refused,
        no_rows,
    )
}
