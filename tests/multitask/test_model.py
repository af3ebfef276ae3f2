"""MultiTaskModel: masks that add exactly nothing, learned weighting, files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MMoE, Tower
from keras_moe.multitask import MultiTaskModel, UncertaintyWeighting
from tests.support import backends
from tests.support.checks import not_on_jax

MEAN = "mean_with_sample_weight"


def _model(loss_weighting=None):
    inputs = keras.Input((6,), name="x")
    shared = MMoE(3, (8,), ["click", "stars"])(inputs)
    outputs = {
        "click": Tower((4,), "sigmoid")(shared["click"]),
        "stars": Tower((4,))(shared["stars"]),
    }
    model = MultiTaskModel(inputs, outputs, loss_weighting)
    model.compile(
        keras.optimizers.Adam(0.01),
        loss={
            "click": keras.losses.BinaryCrossentropy(reduction=MEAN),
            "stars": keras.losses.MeanSquaredError(reduction=MEAN),
        },
        weighted_metrics={
            "click": [keras.metrics.AUC(name="auc")],
            "stars": [keras.metrics.RootMeanSquaredError(name="rmse")],
        },
    )
    return model


def _rows(n=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype("float32")
    clicked = (x[:, :1] > 0).astype("float32")
    y = {"click": clicked, "stars": clicked * (3 + x[:, 1:2])}
    weights = {"click": np.ones(n, "float32"), "stars": clicked[:, 0]}
    return x, y, weights


@pytest.fixture(params=[False, True], ids=["sum", "uncertainty"])
def model(request):
    return _model(UncertaintyWeighting() if request.param else None)


def test_undefined_rows_add_exactly_nothing(model):
    """Adding rows of weight 0 for `stars` changes no digit of its loss and metric."""
    x, y, weights = _rows()
    defined = weights["stars"] > 0
    results = []
    for rows in (defined, np.ones_like(defined)):
        results.append(
            model.evaluate(
                x[rows],
                {k: v[rows] for k, v in y.items()},
                sample_weight={k: v[rows] for k, v in weights.items()},
                batch_size=64,
                verbose=0,
                return_dict=True,
            )
        )
    few, all_rows = results
    for name in ("stars_loss", "stars_rmse"):
        np.testing.assert_allclose(few[name], all_rows[name], rtol=1e-6)
    assert few["click_loss"] != all_rows["click_loss"]


def test_the_value_of_an_undefined_label_does_not_matter(model):
    x, y, weights = _rows()
    wild = {**y, "stars": np.where(weights["stars"][:, None] > 0, y["stars"], 1e3)}
    results = [
        model.evaluate(x, labels, sample_weight=weights, verbose=0, return_dict=True)
        for labels in (y, wild)
    ]
    assert results[0] == results[1]


def test_a_batch_without_a_defined_row_is_finite():
    x, y, weights = _rows(8)
    weights["stars"][:] = 0
    history = _model().fit(x, y, sample_weight=weights, verbose=0)
    assert history.history["stars_loss"] == [0.0]
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("jit_compile", [pytest.param(False, marks=not_on_jax), True])
def test_learns_by_fit_evaluate_and_predict(model, jit_compile):
    if keras.backend.backend() == "torch" and jit_compile:
        pytest.skip("Keras has no compiler for torch")
    model.jit_compile = jit_compile
    x, y, weights = _rows(256)
    history = model.fit(x, y, sample_weight=weights, epochs=20, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["click_auc"][-1] > 0.9
    predictions = model.predict(x, verbose=0)
    assert {k: v.shape for k, v in predictions.items()} == {
        "click": (256, 1),
        "stars": (256, 1),
    }


def test_file_round_trip_keeps_weighting_and_optimizer(model, tmp_path):
    x, y, weights = _rows()
    model.fit(x, y, sample_weight=weights, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is MultiTaskModel
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    for a, b in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0)
    assert again.evaluate(x, y, sample_weight=weights, verbose=0) == expected


def test_uncertainty_weighting_by_hand():
    """At s = (ln 2, 0): 1/2 (4/2 + ln 2 + 3 + 0) = 2.5 + ln(2)/2."""
    weighting = UncertaintyWeighting()
    weighting.build((2,))
    weighting.log_variances.assign([np.log(2.0), 0.0])
    total = ops.convert_to_numpy(weighting(np.array([4.0, 3.0])))
    np.testing.assert_allclose(total, 2.5 + np.log(2) / 2, rtol=1e-6)


def test_uncertainty_weighting_gradients_by_hand():
    """By s: 1/2 (1 - L exp(-s)); by L: 1/2 exp(-s)."""
    weighting = UncertaintyWeighting(dtype="float64")
    weighting.build((3,))
    s, task_losses = np.array([0.7, 0.0, -1.2]), np.array([4.0, 0.3, 2.0])
    weighting.log_variances.assign(s)
    (by_s,), (by_loss,) = backends.gradients(weighting, [task_losses], [1.0])
    np.testing.assert_allclose(by_s, 0.5 * (1 - task_losses * np.exp(-s)), rtol=1e-9)
    np.testing.assert_allclose(by_loss, 0.5 * np.exp(-s), rtol=1e-9)


def test_uncertainty_weighting_learns_the_loss_as_variance():
    """The optimum of exp(-s) L + s is s = ln L."""
    weighting = UncertaintyWeighting()
    inputs = keras.Input((2,))
    model = keras.Model(inputs, ops.expand_dims(weighting(inputs[0]), 0))
    model.compile(keras.optimizers.SGD(0.5), loss=lambda y, total: total)
    x = np.array([[4.0, 0.5]], "float32")
    model.fit(x, np.zeros((1,)), epochs=100, verbose=0)
    learned = ops.convert_to_numpy(weighting.log_variances)
    np.testing.assert_allclose(learned, np.log([4.0, 0.5]), atol=1e-3)


def test_regularisation_is_part_of_the_total():
    inputs = keras.Input((6,))
    shared = MMoE(3, 8, ["a"], kernel_regularizer="l2")(inputs)
    model = MultiTaskModel(
        inputs, {"a": Tower(())(shared["a"])}, UncertaintyWeighting()
    )
    model.compile(loss={"a": "mse"})
    x = np.ones((4, 6))
    result = model.evaluate(x, {"a": np.ones((4, 1))}, verbose=0, return_dict=True)
    penalty = ops.convert_to_numpy(sum(model.losses))
    assert penalty > 0
    np.testing.assert_allclose(
        result["loss"], 0.5 * result["a_loss"] + penalty, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda t: t, "`outputs` must be a dict"),
        (lambda t: [t], "`outputs` must be a dict"),
        (lambda t: {"a b": t}, "Received: 'a b'"),
    ],
)
def test_bad_outputs_are_named(outputs, message):
    inputs = keras.Input((3,))
    with pytest.raises(ValueError, match=message):
        MultiTaskModel(inputs, outputs(inputs + 1.0))


def test_bad_weighting_and_losses_are_named():
    inputs = keras.Input((3,))
    with pytest.raises(
        ValueError, match=r"`loss_weighting` must be None, one of \['famo'"
    ):
        MultiTaskModel(inputs, {"a": inputs + 1.0}, loss_weighting="certainty")
    with pytest.raises(
        ValueError, match=r"`loss_weighting` must be None, .* or a layer"
    ):
        MultiTaskModel(inputs, {"a": inputs + 1.0}, loss_weighting=3)
    model = MultiTaskModel(inputs, {"a": inputs + 1.0}, UncertaintyWeighting())
    for loss in (None, {}, {"a": None}):
        with pytest.raises(ValueError, match="at least one task a loss"):
            model.compile(loss=loss)
    with pytest.raises(ValueError, match="`loss_weights` must be None"):
        model.compile(loss={"a": "mse"}, loss_weights={"a": 2.0})
