"""MultiTaskModel with declared tasks: training, files, datasets, callbacks, errors."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import metrics
from keras_moe.multitask import MultiTaskModel, Task, UncertaintyWeighting, heads
from tests.support.checks import not_on_jax
from tests.support.declared import (
    EAGER,
    assert_near,
    assert_same_bits,
    features,
    model_of,
    weights_of,
)

MEAN = "mean_with_sample_weight"
BACKEND = keras.backend.backend()
X = features(16)
SEEN = (X[:, 0] > 0).astype("float32")
Y = {
    "seen": SEEN,
    "time": np.where(SEEN > 0, 3 * X[:, 1], np.nan),
    "stars": np.where(SEEN > 0, np.arange(16) % 5, np.nan),
}
WEIGHTINGS = pytest.mark.parametrize("weighting", [None, "uncertainty", "pcgrad"])


def _tasks():
    return [
        Task("seen", metrics=[keras.metrics.AUC(name="auc")]),
        Task("time", "regression", defined="seen", metrics=["mae"]),
        Task("stars", heads.Ordinal(5), skip_missing=True),
    ]


@pytest.mark.parametrize("head", ["binary", "regression"])
def test_one_task_is_plain_keras(head):
    """The same losses, metrics and weights as `keras.Model` with the loss of Keras."""
    task = Task("a", head, metrics=["mae"])
    model = model_of([task], optimizer=keras.optimizers.Adam(0.05))
    plain = keras.Model(model.input, model.output["a"])
    loss = {
        "binary": keras.losses.BinaryCrossentropy(reduction=MEAN),
        "regression": keras.losses.MeanSquaredError(reduction=MEAN),
    }[head]
    plain.compile(
        keras.optimizers.Adam(0.05), loss, weighted_metrics=["mae"], run_eagerly=EAGER
    )
    start, y, found = model.get_weights(), SEEN, []
    sample_weight = np.linspace(0, 2, 16)
    for one in (model, plain):
        one.set_weights(start)
        history = one.fit(
            X,
            {"a": y} if one is model else y,
            sample_weight=sample_weight,
            epochs=3,
            batch_size=5,
            shuffle=False,
            verbose=0,
        ).history
        found.append((history["mae"], one.get_weights()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    assert_near(*[weights for _, weights in found])


@WEIGHTINGS
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_an_output_may_be_predicted_only(weighting):
    """Declared without a loss, or not declared at all; both get no gradient."""
    tasks = [
        Task("seen"),
        Task("time", "regression", defined="seen", loss=None, metrics=["mae"]),
        Task("again", "regression", label="seen"),
    ]
    inputs = keras.Input((4,))
    outputs = {task.name: task.tower(())(inputs) for task in tasks}
    outputs["free"] = keras.layers.Dense(1, name="free")(inputs)
    model = MultiTaskModel(inputs, outputs, weighting, tasks=tasks)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGER)
    before = {layer.name: layer.get_weights() for layer in model.layers}
    y = {"seen": SEEN, "time": Y["time"]}
    history = model.fit(X, y, verbose=0).history
    assert "time_loss" not in history
    assert np.isfinite(history["time_mae"]).all()
    assert np.isfinite(history["loss"]).all()
    for name in ("free", "time_tower"):
        assert_same_bits(model.get_layer(name).get_weights(), before[name])
    moved = zip(
        model.get_layer("seen_tower").get_weights(), before["seen_tower"], strict=True
    )
    assert any((a != b).any() for a, b in moved)
    assert set(model.predict(X, verbose=0)) == set(outputs)


@pytest.mark.parametrize("weighting", [None, "uncertainty", "famo", "imtl_g"])
@not_on_jax
def test_training_resumes_from_a_file(weighting, tmp_path):
    """Two epochs, a file, and two more are four epochs."""
    model = model_of(_tasks(), weighting, keras.optimizers.Adam(0.05), eager=False)
    rows = {"batch_size": 8, "verbose": 0, "shuffle": False}
    model.fit(X, Y, epochs=2, **rows)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(weights_of(again), weights_of(model))
    assert [task.get_config() for task in again.declared_tasks] == [
        task.get_config() for task in model.declared_tasks
    ]
    found = [one.fit(X, Y, epochs=2, **rows).history for one in (model, again)]
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-6, err_msg=name)
    assert_near(weights_of(again), weights_of(model), 1e-6, 1e-7)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports from the others")
@not_on_jax
@pytest.mark.parametrize("weighting", ["uncertainty", "pcgrad"])
def test_a_trained_model_is_exported(weighting, tmp_path):
    import tensorflow as tf

    model = model_of(_tasks(), weighting, eager=False)
    model.fit(X, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "served")
    served = loaded.serve(X)
    for name, expected in model.predict(X, verbose=0).items():
        np.testing.assert_allclose(served[name], expected, rtol=1e-5, atol=1e-6)


@not_on_jax
@pytest.mark.parametrize("with_weights", [False, True])
def test_datasets(with_weights):
    """Batches of a dataset are those of arrays; labels in it are not checked."""
    tf = pytest.importorskip("tensorflow")
    weights = np.linspace(0, 2, 16).astype("float32")
    parts = (X, Y, {"time": weights, "seen": np.ones(16)}) if with_weights else (X, Y)
    data = tf.data.Dataset.from_tensor_slices(parts).batch(6)
    model = model_of(_tasks())
    start = model.get_weights()
    found = []
    for arguments in ((X, Y), (data,)):
        model.set_weights(start)
        kwargs = {"verbose": 0}
        if arguments[0] is X:
            kwargs |= {"batch_size": 6}
            kwargs |= {"sample_weight": {"time": weights}} if with_weights else {}
        history = model.fit(*arguments, shuffle=False, epochs=2, **kwargs).history
        measured = model.evaluate(*arguments, return_dict=True, **kwargs)
        found.append((history, measured, model.get_weights()))
    assert found[0][:2] == found[1][:2]
    assert_same_bits(found[0][2], found[1][2])
    wrong = tf.data.Dataset.from_tensor_slices((X, {**Y, "seen": SEEN + 2})).batch(6)
    assert np.isnan(model.evaluate(wrong, verbose=0, return_dict=True)["seen_loss"])


def test_batches_by_hand():
    """`train_on_batch` and `test_on_batch` are `fit` and `evaluate` of one batch."""
    model = model_of(_tasks())
    start = model.get_weights()
    tested = model.test_on_batch(X, Y, return_dict=True)
    measured = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert tested == pytest.approx(measured, rel=1e-6)
    logs = model.train_on_batch(X, Y, return_dict=True)
    weights = model.get_weights()
    model.set_weights(start)
    history = model.fit(X, Y, shuffle=False, verbose=0).history
    assert logs == pytest.approx({k: v[0] for k, v in history.items()}, rel=1e-6)
    assert_same_bits(model.get_weights(), weights)


def test_callbacks_stop_on_the_metric_of_a_task():
    model = model_of(_tasks(), optimizer=keras.optimizers.SGD(0.0))
    seen = []
    for monitor in ("val_time_mae", "val_stars_loss"):
        stop = keras.callbacks.EarlyStopping(monitor, patience=1, mode="min")
        history = model.fit(
            X,
            Y,
            validation_data=(X, Y),
            epochs=9,
            callbacks=[stop],
            verbose=0,
        ).history
        seen.append(len(history[monitor]))
    assert seen == [2, 2]


def test_validation_split_and_shuffle():
    model = model_of(_tasks())
    history = model.fit(X, Y, validation_split=0.25, verbose=0).history
    assert np.isfinite(history["val_loss"]).all()
    np.testing.assert_allclose(history["val_time_defined"], SEEN[12:].mean(), rtol=1e-6)


def test_metrics_by_group():
    """Groups are a feature that the model does not read; one of a single class."""
    gauc = metrics.GAUC(group="user", max_rows=64, name="gauc")
    task = Task("seen", metrics=[gauc])
    inputs = {"x": keras.Input((4,), name="x")}
    model = MultiTaskModel(inputs, {"seen": task.tower(())(inputs["x"])}, tasks=[task])
    model.compile("sgd", run_eagerly=EAGER)
    users = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    seen = np.array([0, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0], "float32")
    data = {"x": X, "user": users}
    found = model.evaluate(data, {"seen": seen}, verbose=0, return_dict=True)
    scores = model.predict({"x": X}, verbose=0)["seen"][:, 0]
    total, count = 0.0, 0
    for user in range(4):
        of = users == user
        ones, zeros = scores[of & (seen > 0)], scores[of & (seen == 0)]
        if len(ones) and len(zeros):
            pairs = [(a > b) + 0.5 * (a == b) for a in ones for b in zeros]
            total, count = total + 4 * np.mean(pairs), count + 4
    np.testing.assert_allclose(
        found["seen_gauc" if "seen_gauc" in found else "gauc"], total / count, rtol=1e-5
    )
    # A single class in every group: no group counts, and the result is defined.
    one_class = (users > 1).astype("float32")
    found = model.evaluate(data, {"seen": one_class}, verbose=0, return_dict=True)
    assert np.isfinite(found["seen_loss"])
    with pytest.raises(ValueError, match="`group` of the metric 'gauc'"):
        model.evaluate({"x": X}, {"seen": seen}, verbose=0)


@WEIGHTINGS
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@not_on_jax
def test_mixed_precision(weighting, policy, tmp_path):
    """Outputs in float32, finite training, and a file that trains on."""
    keras.config.set_dtype_policy(policy)
    try:
        model = model_of(_tasks(), weighting)
    finally:
        keras.config.set_dtype_policy("float32")
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    before = weights_of(model)
    history = model.fit(X, Y, epochs=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert any((a != b).any() for a, b in zip(before, weights_of(model), strict=True))
    for output in model.predict(X, verbose=0).values():
        assert output.dtype == np.float32
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is type(model.optimizer)
    assert np.isfinite(again.fit(X, Y, verbose=0).history["loss"]).all()


def test_loss_weights_of_compile():
    model = model_of(_tasks())
    plain = model.evaluate(X, Y, verbose=0, return_dict=True)
    model.compile("sgd", loss_weights={"time": 3.0, "stars": 0.0}, run_eagerly=EAGER)
    found = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert found["time_loss"] == plain["time_loss"]
    np.testing.assert_allclose(
        found["loss"], plain["seen_loss"] + 3 * plain["time_loss"], rtol=1e-6
    )


def test_config_round_trip():
    model = model_of(_tasks(), UncertaintyWeighting(), shared_layers=["shared"])
    again = MultiTaskModel.from_config(model.get_config())
    assert again.shared_layers == ["shared"]
    assert again.tasks == model.tasks
    assert [task.name for task in again.declared_tasks] == ["seen", "time", "stars"]
    assert isinstance(again.loss_weighting, UncertaintyWeighting)


@pytest.mark.parametrize(
    ("y", "weights", "message"),
    [
        ({"seen": SEEN}, None, r"`y` must have the labels .* without 'stars'"),
        (None, None, r"`y` must be a dict with the keys"),
        ([SEEN, SEEN, SEEN], None, r"`y` must be a dict with the keys"),
        (Y, {"sean": SEEN}, r"keys of `sample_weight` must be labels .* 'sean'"),
        ({**Y, "seen": SEEN.astype(str)}, None, r"labels must be numbers.* 'seen'"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_labels_and_weights_that_do_not_match(y, weights, message, method):
    model = model_of(_tasks())
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(X, y, sample_weight=weights, verbose=0)


def test_labels_of_another_shape():
    """Two columns were broadcast against one, and one-hot rows taken for classes."""
    model = model_of([Task("a"), Task("b", heads.MultiClass(3))])
    good = {"a": np.zeros(16), "b": np.zeros(16)}
    for key, shape in (("a", (16, 2)), ("b", (16, 3))):
        with pytest.raises(ValueError, match=f"labels of the task '{key}' must have o"):
            model.evaluate(X, {**good, key: np.zeros(shape)}, verbose=0)
    with pytest.raises(ValueError, match=r"number of samples|[Cc]ardinality"):
        model.evaluate(X, {**good, "a": np.zeros(4)}, verbose=0)
    inputs = keras.Input((3,))
    with pytest.raises(ValueError, match=r"task 'b' must have 3 units for MultiClass"):
        MultiTaskModel(inputs, {"b": inputs[:, :1]}, tasks=[model.declared_tasks[1]])


def test_further_labels_are_ignored():
    model = model_of(_tasks())
    found = [
        model.evaluate(X, y, sample_weight=weights, verbose=0, return_dict=True)
        for y, weights in (
            (Y, None),
            ({**Y, "other": np.full((16, 3), np.nan)}, None),
            ({**Y, "other": np.zeros((16, 3))}, {"seen": np.ones(16)}),
        )
    ]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(found[2], rel=1e-6)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([Task("nothing")], "must be an output of the model, .*'nothing'"),
        ([Task("a"), Task("a")], "one Task for each name"),
        (Task("a"), "`tasks` must be a sequence"),
        ("a", "`tasks` must be a sequence"),
        ([{"name": "a"}], "`tasks` must be a sequence"),
        ([Task("a", loss=None)], "at least one task with a loss"),
        ([], "at least one task with a loss"),
    ],
)
def test_bad_tasks_are_named(tasks, message):
    inputs = keras.Input((3,))
    with pytest.raises(ValueError, match=message):
        MultiTaskModel(inputs, {"a": inputs + 1.0}, tasks=tasks)


def test_bad_arguments_are_named():
    model = model_of(_tasks())
    for arguments, message in (
        ({"loss": {"seen": "mse"}}, "`loss` must be None for a model with `tasks`"),
        ({"metrics": ["mae"]}, "`metrics` must be a dict"),
        ({"weighted_metrics": ["mae"]}, "`weighted_metrics` must be a dict"),
        ({"loss_weights": [1.0, 2.0]}, "`loss_weights` must be a dict"),
        ({"loss_weights": {"sean": 1.0}}, "keys of `loss_weights` must be tasks"),
        ({"metrics": {"sean": "mae"}}, "keys of `metrics` must be tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            model.compile("sgd", **arguments)
    inputs = keras.Input((3,))
    with pytest.raises(ValueError, match="`shared_layers` must be names"):
        MultiTaskModel(inputs, {"a": inputs + 1.0}, shared_layers=["nothing"])
    with pytest.raises(ValueError, match="`loss_weighting` must be None, one of"):
        MultiTaskModel(inputs, {"a": inputs + 1.0}, "nothing")


def test_a_task_trained_on_what_the_batch_has():
    """`LossParts` name the tasks that are defined, in the order of the outputs."""
    model = model_of(_tasks(), "uncertainty")
    y = {**Y, "seen": np.zeros(16), "stars": np.where(np.arange(16) == 3, 2, np.nan)}
    tensors = {k: ops.convert_to_tensor(v.astype("float32")) for k, v in y.items()}
    _, parts = model.loss_and_parts(
        X, tensors, model(X, training=True), None, training=True
    )
    mask = ops.convert_to_numpy(parts.mask).tolist()
    assert mask == [True, False, True]
    assert ops.convert_to_numpy(parts.losses)[1] == 0.0


def test_a_metric_belongs_to_one_task():
    metric = keras.metrics.MeanSquaredError()
    tasks = [
        Task("seen", metrics=[metric]),
        Task("time", "regression", metrics=[metric]),
    ]
    with pytest.raises(ValueError, match="`tasks` must have metrics of their own"):
        model_of(tasks)


def test_a_loss_of_keras_sees_the_prediction():
    """The mean absolute error of a zero-inflated amount is that of its expectation."""
    task = Task("time", heads.ZILN(), loss="mae", metrics=["mae"])
    model = model_of([task])
    model.compile("sgd", run_eagerly=EAGER)
    logs = model.evaluate(X, {"time": np.abs(Y["time"])}, verbose=0, return_dict=True)
    measured = next(v for k, v in logs.items() if "absolute" in k or k == "mae")
    np.testing.assert_allclose(logs["time_loss"], measured, rtol=1e-5)
