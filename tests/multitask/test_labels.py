"""Labels as they come: undefined ones, missing ones, misspelt ones, of any rank."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.multitask import MultiTaskModel, UncertaintyWeighting
from tests.support import backends
from tests.support.checks import not_on_jax

TASKS = ["click", "stars"]
MEAN = "mean_with_sample_weight"
# Tracing a step takes TensorFlow a second; what is checked before it needs no graph.
EAGER = keras.backend.backend() == "tensorflow"
WEIGHTINGS = pytest.mark.parametrize(
    "weighted", [False, True], ids=["sum", "weighting"]
)


def _model(weighting=None, tasks=TASKS, seed=3, regularizer=None):
    inputs = keras.Input((4,), name="x")
    outputs = {
        task: keras.layers.Dense(
            1,
            "sigmoid" if task != "stars" else None,
            kernel_initializer=keras.initializers.GlorotUniform(seed=seed + i),
            kernel_regularizer=regularizer,
            name=f"{task}_head",
        )(inputs)
        for i, task in enumerate(tasks)
    }
    return MultiTaskModel(inputs, outputs, weighting)


def _rows(n=12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)).astype("float32")
    clicked = (x[:, :1] > 0).astype("float32")
    return x, {"click": clicked, "stars": 3 + x[:, 1:2]}, {"stars": clicked[:, 0]}


def _losses(reduction):
    return {
        "click": keras.losses.BinaryCrossentropy(reduction=reduction),
        "stars": keras.losses.MeanSquaredError(reduction=reduction),
    }


def _arrays(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


@WEIGHTINGS
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", MEAN])
def test_an_undefined_label_may_be_anything(weighted, reduction):
    """Loss, weighted metrics and weights are the same bit for bit, NaN included."""
    x, y, weights = _rows()
    undefined = weights["stars"][:, None] == 0
    model = _model(UncertaintyWeighting() if weighted else None)
    model.compile(
        keras.optimizers.SGD(0.01),
        _losses(reduction),
        weighted_metrics={
            "click": [keras.metrics.AUC(name="auc")],
            "stars": [keras.metrics.RootMeanSquaredError(name="rmse")],
        },
    )
    start, found = _arrays(model.weights), []
    for filler in (0.0, 5.0, 1e9, np.inf, np.nan):
        for variable, value in zip(model.weights, start, strict=True):
            variable.assign(value)
        labels = {**y, "stars": np.where(undefined, filler, y["stars"])}
        history = model.fit(
            x,
            labels,
            sample_weight=weights,
            batch_size=5,
            epochs=2,
            verbose=0,
            shuffle=False,
        ).history
        measured = model.evaluate(
            x, labels, sample_weight=weights, verbose=0, return_dict=True
        )
        found.append((history, measured, _arrays(model.weights)))
    assert np.isfinite(found[0][0]["loss"]).all()
    assert found[0][0]["stars_rmse"][0] > 0
    for history, measured, arrays in found[1:]:
        assert history == found[0][0]
        assert measured == found[0][1]
        for a, b in zip(arrays, found[0][2], strict=True):
            np.testing.assert_array_equal(a, b)


@WEIGHTINGS
def test_a_metric_without_weights_counts_the_label_that_is_there(weighted):
    """As in Keras: NaN where a label is NaN, and the filler where it is a number."""
    x, y, weights = _rows()
    undefined = weights["stars"][:, None] == 0
    model = _model(UncertaintyWeighting() if weighted else None)
    model.compile(
        "sgd",
        _losses(MEAN),
        metrics={"stars": ["mae"]},
        weighted_metrics={"stars": [keras.metrics.MeanAbsoluteError(name="defined")]},
    )
    errors = np.abs(model.predict(x, verbose=0)["stars"] - y["stars"])
    filled = {**y, "stars": np.where(undefined, np.nan, y["stars"])}
    found = model.evaluate(
        x, filled, sample_weight=weights, verbose=0, return_dict=True
    )
    assert np.isnan(found["stars_mae"])
    np.testing.assert_allclose(
        found["stars_defined"], errors[~undefined].mean(), rtol=1e-5
    )
    found = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["stars_mae"], errors.mean(), rtol=1e-5)


@WEIGHTINGS
@pytest.mark.parametrize("with_weights", [False, True])
def test_a_masked_step_of_a_sequence_may_have_any_label(weighted, with_weights):
    inputs = keras.Input((3, 4))
    masked = keras.layers.Masking()(inputs)
    model = MultiTaskModel(
        inputs,
        {task: keras.layers.Dense(1, name=task)(masked) for task in ("a", "b")},
        UncertaintyWeighting() if weighted else None,
    )
    model.compile("sgd", {"a": "mse", "b": "mae"}, weighted_metrics={"b": ["mse"]})
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("float32")
    x[:, 2] = 0.0
    results = []
    for filler in (0.0, np.nan):
        label = np.ones((5, 3, 1), "float32")
        label[:, 2] = filler
        weight = {"a": np.array([[1], [0], [1], [1], [1.0]])} if with_weights else None
        results.append(
            model.evaluate(
                x,
                {"a": label, "b": label},
                sample_weight=weight,
                verbose=0,
                return_dict=True,
            )
        )
    assert results[0] == results[1]
    assert np.isfinite(list(results[0].values())).all()


def test_an_undefined_task_leaves_the_weighting_as_it_is():
    """Its s had fallen by lr / 2 at every step, without bound."""
    x, y, _ = _rows()
    model = _model(UncertaintyWeighting())
    model.compile(keras.optimizers.SGD(0.1), _losses(MEAN))
    nothing = {"click": np.ones(12), "stars": np.zeros(12)}
    before = _arrays(model.weights)
    history = model.fit(
        x, y, sample_weight=nothing, epochs=5, batch_size=4, verbose=0
    ).history
    assert history["stars_loss"] == [0.0] * 5
    click, stars = _arrays([model.loss_weighting.log_variances])[0]
    assert stars == 0.0
    assert click != 0.0
    # The head of the undefined task has not moved either.
    for variable, value in zip(model.weights, before, strict=True):
        if "stars" in variable.path:
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_the_total_is_that_of_the_defined_tasks():
    """At s = (0.3, -1): 1/2 (exp(-0.3) L + 0.3) without the second task."""
    x, y, _ = _rows()
    model = _model(UncertaintyWeighting())
    model.compile("sgd", _losses(MEAN))
    model.loss_weighting.log_variances.assign([0.3, -1.0])
    weight = {"click": np.ones(12), "stars": np.zeros(12)}
    found = model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        found["loss"], 0.5 * (np.exp(-0.3) * found["click_loss"] + 0.3), rtol=1e-5
    )


def test_uncertainty_weighting_with_a_mask_by_hand():
    """At s = (1, 2), losses (4, NaN): 1/2 (4/e + 1); by s: 1/2 (1 - 4/e), 0."""
    weighting = UncertaintyWeighting(dtype="float64")
    weighting.build((2,))
    weighting.log_variances.assign([1.0, 2.0])
    mask = np.array([True, False])
    found = ops.convert_to_numpy(weighting(np.array([4.0, np.nan]), mask=mask))
    np.testing.assert_allclose(found, 0.5 * (4 / np.e + 1), rtol=1e-9)

    class Masked(keras.layers.Layer):
        def __init__(self):
            super().__init__(dtype="float64")
            self.weighting = weighting
            self.built = True

        def call(self, losses):
            return self.weighting(losses, mask=mask)

    total = ops.convert_to_numpy(Masked()(np.array([4.0, 7.0])))
    np.testing.assert_allclose(total, 0.5 * (4 / np.e + 1), rtol=1e-9)
    losses = [np.array([4.0, np.nan])]
    (by_s,), (by_loss,) = backends.gradients(Masked(), losses, [1.0])
    np.testing.assert_allclose(by_s, [0.5 * (1 - 4 / np.e), 0.0], rtol=1e-9)
    np.testing.assert_allclose(by_loss, [0.5 / np.e, 0.0], rtol=1e-9)


@pytest.mark.parametrize(
    ("losses", "mask"),
    [(np.ones((2, 3)), None), (np.ones(3), np.ones(1, bool)), (np.ones(3), True)],
)
def test_other_shapes_of_losses_are_refused(losses, mask):
    with pytest.raises(ValueError, match=r"`(task_losses|mask)` must have the shape"):
        UncertaintyWeighting()(losses, mask=mask)


@keras.saving.register_keras_serializable("tests")
class Mean(keras.layers.Layer):
    """A weighting that knows no mask."""

    def call(self, task_losses):
        return ops.mean(task_losses)


def test_a_weighting_sees_the_tasks_in_the_order_of_the_outputs():
    """On JAX and torch the predictions come sorted by name."""

    class Second(keras.layers.Layer):
        def call(self, task_losses):
            return task_losses[1]

    x, y, _ = _rows()
    model = _model(Second(), ["stars", "click"])
    model.compile("sgd", _losses(MEAN))
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["loss"], found["click_loss"], rtol=1e-6)


def test_a_weighting_needs_no_mask():
    x, y, weights = _rows()
    model = _model(Mean())
    model.compile("sgd", _losses(MEAN))
    found = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        found["loss"], (found["click_loss"] + found["stars_loss"]) / 2, rtol=1e-5
    )


def _esmm(weighting=None):
    """The probability of a conversion is learned through a product alone."""
    inputs = keras.Input((4,), name="x")
    ctr, cvr = (
        keras.layers.Dense(1, "sigmoid", name=name)(inputs) for name in ("ctr", "cvr")
    )
    outputs = {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}
    return MultiTaskModel(inputs, outputs, weighting)


@WEIGHTINGS
@pytest.mark.parametrize("loss", [{}, {"cvr": None}], ids=["absent", "None"])
@pytest.mark.parametrize("labels", [["ctr", "ctcvr"], ["ctr", "cvr", "ctcvr"]])
def test_an_output_may_be_predicted_only(weighted, loss, labels):
    """It needs no loss and no label, and nothing of it is in the total."""
    x, y, _ = _rows()
    model = _esmm(UncertaintyWeighting() if weighted else None)
    loss = {"ctr": "binary_crossentropy", "ctcvr": "binary_crossentropy", **loss}
    model.compile(keras.optimizers.SGD(0.1), loss, weighted_metrics={"ctcvr": ["mae"]})
    y = dict.fromkeys(labels, y["click"])
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == {"loss", "ctr_loss", "ctcvr_loss", "ctcvr_mae"}
    total = found["ctr_loss"] + found["ctcvr_loss"]
    share = 0.5 if weighted else 1.0  # At s = 0.
    np.testing.assert_allclose(found["loss"], share * total, rtol=1e-6)
    history = model.fit(x, y, verbose=0, validation_data=(x, y)).history
    assert "val_ctcvr_mae" in history
    if weighted:
        s = ops.convert_to_numpy(model.loss_weighting.log_variances)
        assert s[1] == 0.0
        assert s[0] != 0.0
    assert set(model.predict(x, verbose=0)) == {"ctr", "cvr", "ctcvr"}


@WEIGHTINGS
def test_a_loss_of_none_may_stand_in_a_list(weighted):
    """In the order of Keras, which sorts the outputs by name: ctcvr, ctr, cvr."""
    x, y, _ = _rows()
    model = _esmm(UncertaintyWeighting() if weighted else None)
    model.compile("sgd", ["mse", "mse", None])
    y = dict.fromkeys(["ctr", "ctcvr"], y["click"])
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == {"loss", "ctr_loss", "ctcvr_loss"}


def test_partial_losses_survive_a_file(tmp_path):
    x, y, _ = _rows()
    model = _esmm(UncertaintyWeighting())
    model.compile("sgd", {"ctr": "mse", "ctcvr": "mse"})
    y = dict.fromkeys(["ctr", "ctcvr"], y["click"])
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert again.evaluate(x, y, verbose=0, return_dict=True) == expected


def _squared(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


LOSSES = {
    "one string": "mse",
    "one object": keras.losses.MeanSquaredError(),
    "one function": _squared,
    "a class name": "MeanSquaredError",
    "a Keras function": keras.losses.mean_squared_error,
    "a list": ["mse", "mae"],
    "a dict of strings": {"click": "binary_crossentropy", "stars": "mse"},
    "crossentropy by shape": {"click": "crossentropy", "stars": "mse"},
    "a dict of many": {"click": "BinaryCrossentropy", "stars": _squared},
    "several for a task": {"click": ["mse", "mae"], "stars": "mse"},
}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_what_compile_takes_it_takes_beside_a_weighting(loss, rank):
    """The losses of the tasks are those that Keras shows without a weighting."""
    x, y, _ = _rows()
    y = {task: labels[:, 0] if rank == 1 else labels for task, labels in y.items()}
    found = []
    for weighting in (None, UncertaintyWeighting()):
        model = _model(weighting)
        model.compile("sgd", loss, run_eagerly=EAGER)
        found.append(model.evaluate(x, y, verbose=0, return_dict=True))
    plain, weighted = found
    losses = [key for key in weighted if key.endswith("_loss")]
    assert sorted(losses) == ["click_loss", "stars_loss"]
    total = sum(weighted[key] for key in losses)
    np.testing.assert_allclose(total / 2, weighted["loss"], rtol=1e-5)  # At s = 0.
    np.testing.assert_allclose(total, plain["loss"], rtol=1e-5)


def _fit(model, x, y, weights):
    model.fit(x, y, sample_weight=weights, verbose=0, shuffle=False)


def _fit_positionally(model, x, y, weights):
    model.fit(x, y, 32, 1, 0, None, 0.0, None, False, None, weights)


def _fit_on_batches(model, x, y, weights):
    model.train_on_batch(x, y, weights)


def _fit_a_dataset(model, x, y, weights):
    import tensorflow as tf

    model.fit(tf.data.Dataset.from_tensors((x, y, weights)), shuffle=False, verbose=0)


def _fit_by_validation(model, x, y, weights):
    model.fit(
        x,
        y,
        sample_weight={"stars": weights["stars"], "click": None},
        verbose=0,
        shuffle=False,
        validation_data=(x, y, weights),
    )


@WEIGHTINGS
@pytest.mark.parametrize(
    "fit",
    [
        _fit,
        _fit_positionally,
        _fit_on_batches,
        pytest.param(_fit_a_dataset, marks=not_on_jax),
        _fit_by_validation,
    ],
)
def test_weights_of_some_tasks_leave_the_others_at_one(weighted, fit):
    x, y, weights = _rows()
    found = []
    for given in (weights, {"click": np.ones(12, "float32"), **weights}):
        model = _model(UncertaintyWeighting() if weighted else None)
        model.compile(
            keras.optimizers.SGD(0.1),
            _losses(MEAN),
            weighted_metrics={"click": ["mae"]},
            run_eagerly=EAGER,
        )
        fit(model, x, y, given)
        measured = model.evaluate(
            x, y, sample_weight=given, verbose=0, return_dict=True
        )
        on_batch = model.test_on_batch(x, y, given, return_dict=True)
        found.append((measured, {k: float(v) for k, v in on_batch.items()}))
    assert found[0] == found[1]


@WEIGHTINGS
def test_a_sequence_without_weights_is_a_mean_over_all_steps(weighted):
    """Weights of 1 for rows alone made it a sum over the steps of a row."""
    inputs = keras.Input((5, 4))
    steps = keras.layers.Dense(1, name="steps")(inputs)
    outputs = {"seq": steps, "one": keras.layers.Flatten()(steps)[:, :1]}
    model = MultiTaskModel(
        inputs, outputs, UncertaintyWeighting() if weighted else None
    )
    mean = keras.losses.MeanSquaredError(reduction=MEAN)
    model.compile("sgd", {"seq": mean, "one": mean}, run_eagerly=EAGER)
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype("float32")
    y = {"seq": x[..., :1], "one": x[:, 0, :1]}
    found = [
        model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
        for weight in (None, {"one": np.ones(6)}, {"seq": np.ones((6, 5))})
    ]
    for measured in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(measured[name], value, rtol=1e-6)


def test_partial_weights_of_any_task_in_turn():
    """TensorFlow gives up the rank of what changes it between calls."""
    x, y, _ = _rows()
    model = _model()
    model.compile("sgd", _losses(MEAN), weighted_metrics={"stars": ["mae"]})
    some = (x[:, 2] > 0).astype("float32")
    given = [{"stars": some}, {"click": some}, {"stars": some[:, None]}, None]
    for weight in given:
        measured = model.evaluate(
            x, y, sample_weight=weight, verbose=0, return_dict=True
        )
        weight = {k: v.reshape(-1) for k, v in (weight or {}).items()}
        full = {task: weight.get(task, np.ones(12, "float32")) for task in TASKS}
        expected = model.evaluate(x, y, sample_weight=full, verbose=0, return_dict=True)
        for name, value in expected.items():
            np.testing.assert_allclose(measured[name], value, rtol=1e-6)


def test_known_labels_of_weight_0_are_left_to_losses_that_compare_rows():
    """As in a plain Keras model: such a loss reads them, whatever their weight."""

    def spread(y_true, y_pred):
        centred = y_true - ops.mean(y_true, axis=0)
        return ops.mean(ops.square(centred - y_pred), axis=-1)

    x, y, weights = _rows()
    inputs = keras.Input((4,))
    head = keras.layers.Dense(1)
    plain = keras.Model(inputs, head(inputs))
    plain.compile("sgd", spread, run_eagerly=EAGER)
    model = MultiTaskModel(inputs, {"stars": head(inputs)})
    model.compile("sgd", {"stars": spread}, run_eagerly=EAGER)
    expected = plain.evaluate(x, y["stars"], sample_weight=weights["stars"], verbose=0)
    found = model.evaluate(x, {"stars": y["stars"]}, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_number_for_an_unknown_label_is_one_that_the_loss_can_take():
    """log(y) has no value at 0, log(1 - y) none at 1."""

    def logs(y_true, y_pred):
        logs = ops.log(y_true) + ops.log1p(-y_true)
        return ops.mean(ops.square(y_pred - logs), axis=-1)

    x, _, weights = _rows()
    label = np.where(weights["stars"] > 0, 0.5, np.nan)[:, None]
    model = _model(tasks=["stars"])
    model.compile("sgd", {"stars": logs}, run_eagerly=EAGER)
    found = model.evaluate(x, {"stars": label}, sample_weight=weights, verbose=0)
    assert np.isfinite(found)
    some = model.evaluate(
        x, {"stars": np.full((12, 1), 0.5)}, sample_weight=weights, verbose=0
    )
    assert found == some


@WEIGHTINGS
def test_keys_that_are_no_tasks_are_named(weighted):
    x, y, _ = _rows()
    model = _model(UncertaintyWeighting() if weighted else None)
    for argument in ("loss", "metrics", "weighted_metrics"):
        with pytest.raises(ValueError, match=rf"`{argument}` must be tasks.*'spent'"):
            model.compile(
                "sgd", **{"loss": {"stars": "mse"}, argument: {"spent": "mse"}}
            )
    model.compile("sgd", {"click": "mse", "stars": "mse"}, metrics={"stars": ["mae"]})
    misspelt = {"click": y["click"], "spent": y["stars"]}
    with pytest.raises(ValueError, match=r"`y` must be tasks.*'spent' in y") as error:
        model.fit(x, misspelt, verbose=0)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"`y` must have labels for 'stars'.*'click'"):
        model.fit(x, {"click": y["click"]}, verbose=0)
    with pytest.raises(ValueError, match=r"`sample_weight` must be tasks.*'spent'"):
        model.fit(x, y, sample_weight={"spent": np.ones(12)}, verbose=0)
    with pytest.raises(ValueError, match=r"`metrics` must be tasks.*'spent'"):
        model.compile("sgd", {"stars": "mse"}, None, {"spent": ["mae"]})
    with pytest.raises(ValueError, match=r"`y` must be a dict of labels.*y=None"):
        model.compute_loss(x, None, model(x))
    with pytest.raises(ValueError, match="as many labels as tasks"):
        model.evaluate(x, y["click"], verbose=0)
    with pytest.raises(ValueError, match="as many weights as tasks"):
        model.compute_loss(x, y, model(x), [np.ones(12)])


@WEIGHTINGS
def test_labels_may_be_a_list_in_the_order_that_keras_has(weighted):
    x, y, _ = _rows()
    model = _model(UncertaintyWeighting() if weighted else None)
    model.compile("sgd", _losses(MEAN), metrics={"stars": ["mae"]})
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    listed = [y["click"], y["stars"]]
    assert model.evaluate(x, listed, verbose=0, return_dict=True) == expected


def test_the_loss_of_a_task_is_a_mean_over_rows():
    x, y, _ = _rows()
    model = _model(UncertaintyWeighting())
    model.compile("sgd", {"click": "mse", "stars": "mse"})
    found = [
        model.evaluate(x, y, batch_size=size, verbose=0, return_dict=True)
        for size in (12, 8)
    ]
    for task in TASKS:
        np.testing.assert_allclose(
            found[0][f"{task}_loss"], found[1][f"{task}_loss"], rtol=1e-6
        )
