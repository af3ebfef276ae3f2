"""ESMM, ESCM2 and the naive model against plain Python, values and gradients."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import Tower
from keras_moe.multitask import ESCM2, ESMM, MultiTaskModel, NaiveConversion
from tests.support import backends, entire_space_oracles, oracles
from tests.support.checks import array, not_on_jax
from tests.support.declared import EAGER, assert_same_bits, features

STAGES = ("click", "conversion")
THREE = ("click", "cart", "buy")
LABELS = {
    "click": np.array([1, 0, 1, 1, 0, 1, 0, 1], "float64"),
    "conversion": np.array([1, np.nan, 0, 1, np.nan, 0, np.nan, 0]),
}
WEIGHTS = np.array([1, 2, 0.5, 1, 1, 0.25, 3, 1.0])


class Losses(keras.layers.Layer):
    """The sum of the losses of the declared tasks, as a layer of the logits."""

    def __init__(self, space, labels, weights=None):
        super().__init__(dtype="float64")
        self.space, self.labels, self.row_weights = space, labels, weights
        self.built = True
        outputs = {
            name: keras.Input((1,), dtype="float64", name=name)
            for name in space.input_names
        }
        self.model = MultiTaskModel(
            outputs, space(outputs), tasks=space.declared_tasks()
        )

    def call(self, *logits):
        outputs = self.space(dict(zip(self.space.input_names, logits, strict=True)))
        labels = {k: ops.convert_to_tensor(v) for k, v in self.labels.items()}
        losses, _ = self.model._declared.losses(labels, outputs, self.row_weights)
        return sum(losses.values())


def _logits(count, n=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, count))


def _check(space, labels, logits, oracle, weights=None, rtol=1e-4):
    """Loss and gradients by all logits, the oracle's by central differences."""
    columns = [logits[:, i : i + 1].copy() for i in range(logits.shape[1])]
    losses = Losses(space, labels, weights)
    (loss,), _, found = backends.outputs_and_gradients(losses, columns, [1.0])
    moved = logits.copy()
    rows = np.stack([np.nan_to_num(labels[k]) for k in space.stages], axis=1)
    used = np.ones(len(logits)) if weights is None else weights
    (wanted,) = oracles.numeric_gradients(lambda: oracle(moved, rows, used), [moved])
    np.testing.assert_allclose(loss, oracle(logits, rows, used), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, rtol=rtol, atol=1e-6)
    return np.concatenate(found, 1)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("space", [ESMM, NaiveConversion, ESCM2])
def test_the_joint_probability_is_the_product(space, policy):
    """To 4 ulp of its logarithm, from 0.9 to 1e-34, in float32 under any policy."""
    z = np.array([[-39.0], [-20], [-9], [-1], [0], [2], [30]], "float32")
    layer = space(dtype=policy)
    outputs = layer({"click": z, "conversion": z[::-1] - 1})
    for name, output in outputs.items():
        assert keras.backend.standardize_dtype(output.dtype) == "float32", name
    for row in range(len(z)):
        logits = [float(z[row, 0]), float(z[::-1][row, 0]) - 1]
        conditional, joint = entire_space_oracles.chain(logits)
        for name, p in zip(STAGES, conditional, strict=True):
            np.testing.assert_allclose(array(outputs[name])[row, 0], p, rtol=1e-6)
        np.testing.assert_allclose(
            array(outputs["click_and_conversion"])[row, 0], joint[1], rtol=5e-6
        )


def test_float64_logits_stay_in_float64():
    outputs = ESMM(dtype="float64")({k: np.full((1, 1), -20.0) for k in STAGES})
    _, joint = entire_space_oracles.chain([-20.0, -20.0])
    np.testing.assert_allclose(
        array(outputs["click_and_conversion"])[0, 0], joint[1], rtol=1e-12
    )


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_gradients_at_probabilities_of_1e_18(label):
    """By both logits: of -log p q, -(1 - p) and -(1 - q); Keras' loss has 0."""
    z = np.full((1, 1), -20.0, "float32")
    losses = Losses(ESMM(), {"click": np.ones(1), "conversion": np.full(1, label)})
    _, _, (click, conversion) = backends.outputs_and_gradients(losses, [z, z], [1.0])
    p = 1 / (1 + np.exp(20.0))
    of_click = -(1 - p)
    # Of -log(1 - p q): p q (1 - p) / (1 - p q).
    of_joint = -(1 - p) if label else p * p * (1 - p) / (1 - p * p)
    np.testing.assert_allclose(click, [[of_click + of_joint]], rtol=1e-5)
    np.testing.assert_allclose(conversion, [[of_joint]], rtol=1e-4)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_esmm_is_the_oracle(weights):
    space = ESMM(dtype="float64")
    _check(space, LABELS, _logits(2), entire_space_oracles.esmm, weights)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_naive_is_the_oracle(weights):
    space = NaiveConversion(dtype="float64")
    _check(space, LABELS, _logits(2), entire_space_oracles.naive, weights)


@pytest.mark.parametrize(
    ("space", "oracle"),
    [
        (ESMM, entire_space_oracles.esmm),
        (NaiveConversion, entire_space_oracles.naive),
    ],
)
def test_three_stages(space, oracle):
    labels = {
        "click": np.array([1, 0, 1, 1, 0, 1.0]),
        "cart": np.array([1, np.nan, 0, 1, np.nan, 1]),
        "buy": np.array([1, np.nan, np.nan, 0, 1, 1]),
    }
    layer = space(THREE, dtype="float64")
    assert layer.joint_names == ("click", "click_and_cart", "click_and_cart_and_buy")
    # What stands after a stage that did not happen does not matter.
    labels["cart"][4] = 5.0
    _check(layer, labels, _logits(3, 6), oracle)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("method", ["ipw", "dr"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conversion_weight": 0.3, "joint_weight": 0.0, "min_propensity": 0.6},
        {"conversion_weight": 2.5, "joint_weight": 0.7, "min_propensity": 1.0},
    ],
)
def test_escm2_is_the_oracle(options, method, weights):
    """The propensity has no gradient, the imputation only that of its own loss."""
    count = 2 if method == "ipw" else 3
    logits = _logits(count, seed=2)
    held = logits.copy()
    values = (
        options.get("conversion_weight", 1.0),
        options.get("joint_weight", 1.0),
        options.get("min_propensity", 0.05),
    )

    def oracle(moved, labels, weights):
        return entire_space_oracles.escm2(moved, labels, weights, method, held, *values)

    space = ESCM2(method=method, dtype="float64", **options)
    found = _check(space, LABELS, logits, oracle, weights)
    if method == "dr":
        unclicked = LABELS["click"] == 0
        assert (found[unclicked, 2] == 0).all()
        assert (found[~unclicked, 2] != 0).all()


def test_a_propensity_of_1_is_the_naive_model():
    """Times the share of clicks, 5 of 8: values and gradients of the conversion."""
    logits = _logits(2)
    columns = [logits[:, :1], logits[:, 1:]]
    options = {"joint_weight": 0.0, "min_propensity": 1.0}
    found = []
    for space in (ESCM2(dtype="float64", **options), NaiveConversion(dtype="float64")):
        losses = Losses(space, LABELS)
        _, _, (_, gradient) = backends.outputs_and_gradients(losses, columns, [1.0])
        loss = losses.model._declared.losses(
            {k: ops.convert_to_tensor(v) for k, v in LABELS.items()},
            space(dict(zip(STAGES, columns, strict=True))),
            None,
        )[0]["conversion"]
        found.append((array(loss), gradient))
    np.testing.assert_allclose(found[0][0], found[1][0] * 5 / 8, rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1] * 5 / 8, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["ipw", "dr"])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_a_propensity_of_0_or_1_is_finite(method, logit):
    space = ESCM2(method=method)
    columns = [np.full((8, 1), logit, "float32") for _ in space.input_names]
    losses = Losses(space, LABELS)
    (loss,), _, found = backends.outputs_and_gradients(losses, columns, [1.0])
    assert np.isfinite(loss)
    for gradient in found:
        assert np.isfinite(gradient).all()


def _model(space, weighting=None, eager=EAGER, seed=0):
    """A network of two layers below the logits."""
    inputs = keras.Input((4,), name="x")
    initializer = keras.initializers.GlorotUniform(seed=seed)
    hidden = keras.layers.Dense(3, "tanh", kernel_initializer=initializer)(inputs)
    logits = {
        name: Tower((), kernel_initializer=initializer, name=f"{name}_logit")(hidden)
        for name in space.input_names
    }
    model = MultiTaskModel(
        inputs,
        space(logits),
        weighting,
        tasks=space.declared_tasks({space.stages[1]: ["auc"]}),
    )
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=eager)
    return model


SPACES = {
    "esmm": (ESMM, {}),
    "naive": (NaiveConversion, {}),
    "ipw": (ESCM2, {}),
    "dr": (ESCM2, {"method": "dr"}),
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("weighting", [None, pytest.param("pcgrad", marks=not_on_jax)])
def test_labels_without_a_click_change_no_bit(name, weighting):
    kind, options = SPACES[name]
    model, found = _model(kind(**options), weighting), []
    x, start = features(8), [array(v) for v in model.variables]
    for filler in (0.0, 5.0, 1e9, np.inf, np.nan):
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        y = dict(LABELS)
        y["conversion"] = np.where(y["click"] > 0, y["conversion"], filler)
        history = model.fit(
            x, y, batch_size=3, epochs=2, verbose=0, shuffle=False
        ).history
        measured = model.evaluate(x, y, verbose=0, return_dict=True)
        found.append((history, measured, model.get_weights()))
    assert np.isfinite(found[0][0]["loss"]).all()
    assert found[0][0]["conversion_defined"][0] == 5 / 8
    for history, measured, weights in found[1:]:
        assert history == found[0][0]
        assert measured == found[0][1]
        assert_same_bits(weights, found[0][2])


def test_a_step_of_a_network_of_two_layers():
    """The weights after a step of SGD, by differences of the oracle's loss."""
    model, x = _model(ESMM()), features(8)
    kernel, bias, *towers = [w.astype("float64") for w in model.get_weights()]
    rows = np.stack([np.nan_to_num(LABELS[k]) for k in STAGES], axis=1)
    arrays = [kernel, bias, *towers]

    def loss():
        hidden = np.tanh(x @ arrays[0] + arrays[1])
        logits = [hidden @ arrays[i] + arrays[i + 1] for i in (2, 4)]
        return entire_space_oracles.esmm(np.concatenate(logits, 1), rows, WEIGHTS)

    gradients = oracles.numeric_gradients(loss, arrays)
    wanted = [w - 0.1 * g for w, g in zip(arrays, gradients, strict=True)]
    history = model.fit(x, LABELS, sample_weight=WEIGHTS, verbose=0).history
    np.testing.assert_allclose(history["loss"], [loss()], rtol=1e-5)
    for found, value in zip(model.get_weights(), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


@not_on_jax
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name", SPACES)
def test_file_round_trip(name, tmp_path):
    kind, options = SPACES[name]
    model, x = _model(kind(**options)), features(8)
    model.fit(x, LABELS, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for key, output in model.predict(x, verbose=0).items():
        np.testing.assert_array_equal(again.predict(x, verbose=0)[key], output)
    found = [one.fit(x, LABELS, verbose=0).history for one in (model, again)]
    for key, values in found[0].items():
        np.testing.assert_allclose(found[1][key], values, rtol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_compiled_calls_are_the_eager_call(name):
    kind, options = SPACES[name]
    layer = kind(**options)
    inputs = {
        key: ops.convert_to_tensor(_logits(1, seed=i).astype("float32"))
        for i, key in enumerate(layer.input_names)
    }
    wanted = layer(inputs)
    for call in backends.compiled_calls(layer).values():
        for key, output in call(inputs).items():
            np.testing.assert_allclose(array(output), array(wanted[key]), rtol=1e-6)
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    for key, output in again(inputs).items():
        np.testing.assert_array_equal(array(output), array(wanted[key]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ESMM(("click",)), "`stages` must name at least two events"),
        (lambda: ESMM(("click", "click")), "click"),
        (lambda: ESCM2(THREE), "`stages` must name two events"),
        (lambda: ESCM2(method="mle"), "`method` must be"),
        (lambda: ESCM2(min_propensity=0.0), "`min_propensity`"),
        (lambda: ESCM2(min_propensity=1.5), r"`min_propensity` must be in \(0, 1\]"),
        (lambda: ESCM2(conversion_weight=0.0), "`conversion_weight`"),
        (
            lambda: ESCM2(joint_weight=-1.0),
            "`joint_weight` must be a finite number >= 0",
        ),
        (lambda: ESMM()({"click": np.zeros((1, 1))}), "ESMM expects a dict of logits"),
        (lambda: ESMM()(np.zeros((1, 1))), "ESMM expects a dict of logits"),
        (lambda: ESMM().declared_tasks({"buy": ["auc"]}), "keys of `metrics`"),
        (
            lambda: ESCM2(method="dr")({k: np.zeros((1, 1)) for k in STAGES}),
            "ESCM2 expects a dict of logits with the keys .*imputed_conversion",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_a_weight_no_task_is_defined():
    """Else a weighting would take a loss of 0 for a task that is learned."""
    losses = Losses(ESCM2(), LABELS)
    outputs = losses.space({name: _logits(1) for name in STAGES})
    labels = {k: ops.convert_to_tensor(v) for k, v in LABELS.items()}
    for weights, wanted in ((np.zeros(8), False), (WEIGHTS, True)):
        _, mask = losses.model._declared.losses(labels, outputs, weights)
        assert array(mask).tolist() == [wanted] * 3


def test_metrics_of_stages():
    """Those of a stage count the rows where the stage before it happened."""
    tasks = ESMM(THREE).declared_tasks({"buy": ["auc"], "click_and_cart": ["mae"]})
    by_name = {task.name: task for task in tasks}
    assert set(by_name) == {*THREE, "click_and_cart", "click_and_cart_and_buy"}
    assert [metric.name for metric in by_name["buy"].metrics] == ["auc"]
    assert by_name["buy"].defined == ("click", "cart")
    assert by_name["buy"].loss is None
    assert by_name["click_and_cart_and_buy"].label_keys == THREE


def test_features_in_place_of_logits_are_named():
    with pytest.raises(ValueError, match=r"ESMM expects logits of shape \(n, 1\)"):
        ESMM()({"click": np.ones((2, 8)), "conversion": np.ones((2, 1))})
