"""DBMTL against a NumPy oracle: outputs, gradients, files."""

import keras
import numpy as np
import pytest

from keras_moe.multitask import DBMTL
from tests.support import backends, checks, entire_space_oracles
from tests.support.checks import array, not_on_jax, rows

CHAIN = {"click": [], "cart": ["click"], "buy": ["click", "cart"]}


class _Call(keras.layers.Layer):
    def __init__(self, layer):
        super().__init__(dtype="float64")
        self.layer = layer
        self.built = True

    def call(self, *inputs):
        outputs = self.layer(dict(zip(self.layer.parents, inputs, strict=True)))
        return [outputs[task] for task in self.layer.parents]


@pytest.mark.parametrize("units", [2, pytest.param((3, 2), marks=not_on_jax)])
def test_outputs_and_gradients_are_those_of_the_oracle(units):
    layer = DBMTL(CHAIN, units, dtype="float64")
    widths = {"click": 3, "cart": 2, "buy": 4}
    layer.build({task: (5, width) for task, width in widths.items()})
    values = checks.randomised(layer)
    inputs = [rows(5, width, seed=i) for i, width in enumerate(widths.values())]

    def expected():
        layers = {
            task: [(values[id(d.kernel)], values[id(d.bias)]) for d in mlp]
            for task, mlp in layer.mlps.items()
        }
        given = dict(zip(CHAIN, inputs, strict=True))
        return list(entire_space_oracles.dbmtl(given, CHAIN, layers).values())

    assert len(layer.trainable_variables) == 6 * (1 if units == 2 else 2)
    checks.check(_Call(layer), inputs, expected, values)


def test_the_order_of_the_inputs_does_not_matter():
    """JAX and torch sort a dict by name."""
    layer = DBMTL(CHAIN, 2)
    inputs = {task: rows(3, 4, seed=i) for i, task in enumerate(CHAIN)}
    wanted = layer(inputs)
    again = layer({task: inputs[task] for task in sorted(inputs)})
    for task in CHAIN:
        np.testing.assert_array_equal(array(again[task]), array(wanted[task]))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_config_file_and_shapes(policy, tmp_path):
    layer = DBMTL(CHAIN, (3, 2), activation="tanh", dtype=policy)
    inputs = {task: keras.Input((4,), name=task) for task in CHAIN}
    model = keras.Model(inputs, layer(inputs))
    x = {task: rows(3, 4, seed=i).astype("float32") for i, task in enumerate(CHAIN)}
    found = layer(x)
    for task, shape in layer.compute_output_shape(
        {task: (3, 4) for task in CHAIN}
    ).items():
        assert tuple(found[task].shape) == shape
        dtype = keras.backend.standardize_dtype(found[task].dtype)
        assert dtype == model.output[task].dtype
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_layer(layer.name).get_config() == layer.get_config()
    for task, value in again(x).items():
        np.testing.assert_array_equal(array(value), array(found[task]))


def test_compiled_calls_are_the_eager_call():
    layer = DBMTL(CHAIN, 2)
    inputs = {
        task: keras.ops.convert_to_tensor(rows(3, 4, seed=i).astype("float32"))
        for i, task in enumerate(CHAIN)
    }
    wanted = layer(inputs)
    for call in backends.compiled_calls(layer).values():
        for task, output in call(inputs).items():
            np.testing.assert_allclose(
                array(output), array(wanted[task]), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DBMTL(["click"], 2), "`parents` must be a dict"),
        (lambda: DBMTL({"a": ["b"], "b": []}, 2), "must depend on tasks before it"),
        (lambda: DBMTL({"a": ["a"]}, 2), "must depend on tasks before it"),
        (lambda: DBMTL({"a": [], "b": "a"}, 2), "given as a list"),
        (lambda: DBMTL({"a": [], "b": None}, 2), "given as a list"),
        (lambda: DBMTL({"a": []}, 0), "`units.*must be"),
        (lambda: DBMTL({"a": []}, ()), "`units`"),
        (lambda: DBMTL(CHAIN, 2)({"click": np.ones((1, 2))}), "DBMTL expects a dict"),
        (lambda: DBMTL(CHAIN, 2)(np.ones((1, 2))), "DBMTL expects a dict"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
