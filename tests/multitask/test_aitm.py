"""AITM against a NumPy oracle: outputs, calibrator, gradients, files."""

import keras
import numpy as np
import pytest

from keras_moe.multitask import AITM, MultiTaskModel
from tests.support import backends, checks, entire_space_oracles
from tests.support.checks import array, not_on_jax, rows
from tests.support.declared import EAGER, features

TWO, THREE = ("click", "conversion"), ("click", "cart", "buy")


class _Call(keras.layers.Layer):
    """The joint probabilities, and the calibrator's loss, of features by stage."""

    def __init__(self, layer):
        super().__init__(dtype="float64")
        self.layer = layer
        self.built = True

    def call(self, *inputs):
        outputs = self.layer(dict(zip(self.layer.stages, inputs, strict=True)))
        return [outputs[name] for name in self.layer.joint_names]


class _Calibrator(_Call):
    def call(self, *inputs):
        self.layer(dict(zip(self.layer.stages, inputs, strict=True)))
        return self.layer.losses[-1]


def _parameters(layer, values):
    def of(dense):
        return values[id(dense.kernel)], values[id(dense.bias)]

    return {
        "stages": [
            [of(group[i]) for group in parts]
            for i in range(len(layer.stages) - 1)
            for parts in [(layer.transfers, layer.queries, layer.keys, layer.values)]
        ],
        "towers": [
            [of(dense) for dense in (*tower.hidden, tower.output_unit)]
            for tower in layer.towers
        ],
    }


@pytest.mark.parametrize(
    ("stages", "tower_units"),
    [(TWO, ()), pytest.param(THREE, (2,), marks=not_on_jax)],
)
def test_outputs_and_gradients_are_those_of_the_oracle(stages, tower_units):
    layer = AITM(stages, units=4, tower_units=tower_units, dtype="float64")
    layer.build(dict.fromkeys(stages, (5, 3)))
    values = checks.randomised(layer)
    inputs = [rows(5, 3, seed=i) for i in range(len(stages))]

    def expected():
        found = entire_space_oracles.aitm(inputs, _parameters(layer, values), 4)
        return [found[:, i : i + 1] for i in range(len(stages))]

    checks.check(_Call(layer), inputs, expected, values)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="a stateless call collects losses"
)
def test_the_calibrator():
    """Its loss and gradients; 0 where no probability exceeds the one before."""
    layer = AITM(units=2, dtype="float64", calibrator_weight=0.7)
    layer.build(dict.fromkeys(TWO, (6, 3)))
    values = checks.randomised(layer, seed=3)
    inputs = [rows(6, 3, seed=i) for i in range(2)]

    def expected():
        found = entire_space_oracles.aitm(inputs, _parameters(layer, values), 2)
        return [np.array(0.7 * entire_space_oracles.calibrator(found))]

    assert expected()[0] > 0
    checks.check(_Calibrator(layer), inputs, expected, values)


def test_the_conditional_probability_is_a_ratio():
    """0.2 / 0.5 = 0.4, at most 1: the calibrator only asks for an order."""
    layer = AITM(THREE, units=4)
    inputs = {stage: rows(40, 3, seed=i) * 3 for i, stage in enumerate(THREE)}
    outputs = {name: array(output) for name, output in layer(inputs).items()}
    names = layer.joint_names
    capped = 0
    for before, joint, stage in zip(names[:-1], names[1:], THREE[1:], strict=True):
        ratio = outputs[joint] / outputs[before]
        np.testing.assert_allclose(outputs[stage], np.minimum(ratio, 1.0), rtol=1e-6)
        capped += (ratio > 1).sum()
    assert capped
    assert len(AITM(units=2, calibrator_weight=0.0).losses) == 0


def _model(layer):
    inputs = keras.Input((4,), name="x")
    hidden = {
        stage: keras.layers.Dense(3, "tanh", name=f"{stage}_features")(inputs)
        for stage in layer.stages
    }
    model = MultiTaskModel(inputs, layer(hidden), tasks=layer.declared_tasks())
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGER)
    return model


def test_the_loss_is_that_of_the_joint_probabilities():
    model, x = _model(AITM(units=4, calibrator_weight=2.0)), features(8)
    y = {
        "click": np.array([1, 0, 1, 1, 0, 1, 0, 1.0]),
        "conversion": np.array([1, np.nan, 0, 1, np.nan, 0, np.nan, 1]),
    }
    outputs = model.predict(x, verbose=0)
    joint = [
        outputs[name].astype("float64") for name in ("click", TWO[0] + "_and_" + TWO[1])
    ]
    both = y["click"] * np.nan_to_num(y["conversion"])
    wanted = 0.0
    for p, label in zip(joint, (y["click"], both), strict=True):
        p = p[:, 0]
        wanted -= np.mean(np.where(label > 0, np.log(p), np.log1p(-p)))
    excess = entire_space_oracles.calibrator(np.concatenate(joint, 1))
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], wanted + 2 * excess, rtol=1e-5)
    assert found["conversion_defined"] == 5 / 8
    weights = []
    start = model.get_weights()
    for filler in (0.0, 1e9, np.nan):
        model.set_weights(start)
        labels = {**y, "conversion": np.where(y["click"] > 0, y["conversion"], filler)}
        model.fit(x, labels, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    for others in weights[1:]:
        for a, b in zip(others, weights[0], strict=True):
            np.testing.assert_array_equal(a, b)


@not_on_jax
def test_file_round_trip(tmp_path):
    model, x = _model(AITM(THREE, units=4, tower_units=(3,), dropout=0.2)), features(8)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    found = again.predict(x, verbose=0)
    for name, output in model.predict(x, verbose=0).items():
        np.testing.assert_array_equal(found[name], output)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_outputs_are_float32_under_mixed_precision(policy):
    """As their shapes say, and a probability of 1e-18 is not 0."""
    layer = AITM(units=4, tower_units=3, dtype=policy)
    inputs = {stage: np.ones((2, 3), "float32") for stage in TWO}
    layer(inputs)
    for tower in layer.towers:
        tower.output_unit.bias.assign([-40.0])
    for name, output in layer(inputs).items():
        assert keras.backend.standardize_dtype(output.dtype) == "float32", name
    assert 0 < array(layer(inputs)["click"]).min() < 1e-14
    spec = layer({stage: keras.KerasTensor((None, 3)) for stage in TWO})
    assert {tensor.dtype for tensor in spec.values()} == {"float32"}


def test_compiled_calls_are_the_eager_call():
    layer = AITM(units=4, tower_units=3)
    inputs = {
        stage: keras.ops.convert_to_tensor(rows(5, 3, seed=i).astype("float32"))
        for i, stage in enumerate(TWO)
    }
    wanted = layer(inputs)
    for call in backends.compiled_calls(layer).values():
        for key, output in call(inputs).items():
            np.testing.assert_allclose(array(output), array(wanted[key]), rtol=1e-5)


def test_weights_are_drawn_independently():
    layer = AITM(THREE, units=3, tower_units=3, kernel_initializer="glorot_uniform")
    layer.build(dict.fromkeys(THREE, (2, 3)))
    kernels = [array(w) for w in layer.trainable_variables if len(w.shape) == 2]
    checks.assert_all_different(kernels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AITM(units=0), "`units`"),
        (lambda: AITM(units=2, calibrator_weight=-1), "`calibrator_weight` must be"),
        (lambda: AITM(units=2, dropout=1.0), "`dropout`"),
        (lambda: AITM(("click",), units=2), "`stages` must name"),
        (lambda: AITM(units=2)({"click": np.ones((2, 3))}), "AITM expects a dict"),
        (
            lambda: AITM(units=2)(
                {"click": np.ones((2, 3)), "conversion": np.ones((2, 4))}
            ),
            "AITM expects features of the same last axis",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
