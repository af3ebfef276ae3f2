"""Task: undefined rows, labels, weights, and what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.multitask import Task, heads
from tests.support import task_oracles
from tests.support.checks import not_on_jax
from tests.support.declared import (
    EAGER,
    assert_near,
    assert_same_bits,
    features,
    model_of,
    set_weights,
    weights_of,
)

WEIGHTINGS = pytest.mark.parametrize(
    "weighting",
    [None, *(pytest.param(w, marks=not_on_jax) for w in ("uncertainty", "pcgrad"))],
)
X = features()
SEEN = (X[:, 0] > 0).astype("float32")


@keras.saving.register_keras_serializable("tests")
def bought(labels):
    return ops.logical_and(labels["seen"] > 0, labels["bought"] > 0)


def _tasks():
    """Every head, on rows that other labels decide."""
    return [
        Task("seen", metrics=[keras.metrics.AUC(name="auc")]),
        Task("stars", heads.Ordinal(5), defined="seen", metrics=["mae"]),
        Task("paid", "ziln", defined=bought, metrics=["mse"]),
        Task("kind", heads.MultiClass(3), defined="seen", metrics=["accuracy"]),
        Task("time", "regression", defined="seen", metrics=["mae"]),
        Task("bought_too", label="bought", defined="seen", metrics=["acc"]),
    ]


def _labels():
    rng = np.random.default_rng(1)
    n = len(X)
    return {
        "seen": SEEN,
        "bought": SEEN * rng.integers(0, 2, n),
        "stars": rng.integers(0, 5, n).astype("float32"),
        "paid": np.exp(rng.normal(size=n)).astype("float32"),
        "kind": rng.integers(0, 3, n).astype("float32"),
        "time": rng.normal(size=n).astype("float32"),
    }


@WEIGHTINGS
def test_undefined_labels_change_no_bit(weighting):
    """Of losses, metrics and weights after training, whatever stands there."""
    model, found = model_of(_tasks(), weighting), []
    start = weights_of(model)
    for filler in (0.0, 5.0, 1e9, np.inf, np.nan):
        set_weights(model, start)
        y = _labels()
        undefined = {key: SEEN == 0 for key in ("stars", "kind", "time", "bought")}
        undefined["paid"] = y["bought"] == 0
        for key, rows in undefined.items():
            y[key] = np.where(rows, filler, y[key])
        history = model.fit(
            X, y, batch_size=5, epochs=2, verbose=0, shuffle=False
        ).history
        measured = model.evaluate(X, y, verbose=0, return_dict=True)
        found.append((history, measured, weights_of(model)))
    history, measured, weights = found[0]
    assert all(np.isfinite(values).all() for values in history.values())
    assert any((a != b).any() for a, b in zip(weights, start, strict=True))
    for again, measured_again, weights_again in found[1:]:
        assert again == history
        assert measured_again == measured
        assert_same_bits(weights_again, weights)


def test_training_sees_only_the_defined_rows():
    """Losses, metrics and weights are those of a model without the other rows."""
    task = Task("stars", heads.Ordinal(5), defined="seen", metrics=["mae"])
    model = model_of([task], optimizer=keras.optimizers.Adam(0.05))
    start, y, found = weights_of(model), _labels(), []
    for rows in (np.ones(len(X), bool), SEEN > 0):
        set_weights(model, start)
        model.optimizer = keras.optimizers.Adam(0.05)
        data = X[rows], {"stars": y["stars"][rows], "seen": SEEN[rows]}
        history = model.fit(*data, batch_size=12, epochs=3, verbose=0).history
        found.append((history, weights_of(model)))
    (history, weights), (few, few_weights) = found
    for name in ("stars_loss", "loss", "stars_mae" if "stars_mae" in few else "mae"):
        np.testing.assert_allclose(history[name], few[name], rtol=1e-5)
    np.testing.assert_allclose(history["stars_defined"], SEEN.mean(), rtol=1e-6)
    assert few["stars_defined"] == [1.0] * 3
    assert_near(weights, few_weights)


@WEIGHTINGS
def test_a_batch_without_a_defined_row(weighting):
    """Its loss is 0, and the share of defined rows says why; so in an epoch."""
    model, y = model_of(_tasks(), weighting), _labels()
    y["seen"] = np.zeros(len(X))
    for key in ("bought", "stars", "paid", "kind", "time"):
        y[key] = np.full(len(X), np.nan)
    history = model.fit(X, y, batch_size=4, epochs=2, verbose=0).history
    for task in ("stars", "paid", "kind", "time", "bought_too"):
        assert history[f"{task}_loss"] == [0.0, 0.0]
        assert history[f"{task}_defined"] == [0.0, 0.0]
    assert all(np.isfinite(values).all() for values in history.values())
    assert all(np.isfinite(w).all() for w in weights_of(model))
    # Only what the defined task reaches has moved.
    measured = model.evaluate(X, y, verbose=0, return_dict=True)
    assert measured["stars_loss"] == measured["stars_mae"] == 0.0


def test_an_epoch_is_a_mean_over_defined_rows():
    """Batches have 1, 3 and 0 defined rows: the mean is over the 4 rows."""
    task = Task("time", "regression", defined="seen")
    model = model_of([task])
    seen = np.array([1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0], "float32")
    y = {"time": np.where(seen > 0, 3 * X[:, 1], np.nan), "seen": seen}
    outputs = model.predict(X, verbose=0)["time"]
    found = model.evaluate(X, y, batch_size=4, verbose=0, return_dict=True)
    wanted = task_oracles.mean(task_oracles.squared_error, y["time"], outputs, seen)
    np.testing.assert_allclose(found["time_loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["time_defined"], 4 / 12, rtol=1e-6)


WEIGHTS = np.linspace(0, 2, 12).astype("float32")


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        WEIGHTS[:, None],
        {"time": WEIGHTS},
        {"time": WEIGHTS[:, None], "seen": np.ones(12)},
    ],
    ids=["(n,)", "(n, 1)", "dict", "dict of all"],
)
def test_sample_weights(weights):
    """As the oracle says: a mean over the weights of defined rows."""
    tasks = [Task("seen"), Task("time", "regression", defined="seen", metrics=["mae"])]
    model, y = model_of(tasks), _labels()
    y = {"seen": y["seen"], "time": np.where(SEEN > 0, y["time"], np.nan)}
    outputs = model.predict(X, verbose=0)
    found = model.evaluate(X, y, sample_weight=weights, verbose=0, return_dict=True)
    wanted = task_oracles.mean(
        task_oracles.squared_error, y["time"], outputs["time"], WEIGHTS * SEEN
    )
    np.testing.assert_allclose(found["time_loss"], wanted, rtol=1e-5)
    used = WEIGHTS * SEEN
    errors = np.abs(np.nan_to_num(y["time"]) - outputs["time"][:, 0])
    np.testing.assert_allclose(
        found["time_mae"], (errors * used).sum() / used.sum(), rtol=1e-5
    )
    of_seen = np.ones(12) if isinstance(weights, dict) else WEIGHTS
    wanted = task_oracles.mean(task_oracles.binary, y["seen"], outputs["seen"], of_seen)
    np.testing.assert_allclose(found["seen_loss"], wanted, rtol=1e-5)
    # A row of weight 0 is undefined.
    np.testing.assert_allclose(found["time_defined"], (used > 0).mean(), rtol=1e-6)


def test_weights_that_sum_to_zero():
    """No row counts: the loss is 0, and no weight moves."""
    model = model_of([Task("time", "regression", metrics=["mae"])])
    start = weights_of(model)
    y = {"time": np.full(12, np.nan)}
    history = model.fit(X, y, sample_weight=np.zeros(12), verbose=0).history
    assert history["loss"] == history["time_loss"] == [0.0]
    assert_same_bits(weights_of(model), start)


@pytest.mark.parametrize("weights", [None, WEIGHTS, {"a": WEIGHTS}])
def test_a_product_of_labels(weights):
    """0 where a label is 0, NaN or not; weights count once."""
    task = Task("both", label=("a", "b"))
    model = model_of([task])
    a = np.array([0, 1, 0, 1, 1, 0] * 2, "float32")
    b = np.array([np.nan, 1, 5, 0, 1, np.inf] * 2, "float32")
    outputs = model.predict(X, verbose=0)["both"]
    found = model.evaluate(
        X, {"a": a, "b": b}, sample_weight=weights, verbose=0, return_dict=True
    )
    both = [0, 1, 0, 0, 1, 0] * 2
    used = None if weights is None else WEIGHTS
    wanted = task_oracles.mean(task_oracles.binary, both, outputs, used)
    np.testing.assert_allclose(found["both_loss"], wanted, rtol=1e-5)


def test_a_nan_in_the_first_label_of_a_product():
    rows = Task("both", label=("a", "b", "c")).rows(
        {
            "a": np.array([np.nan, 1.0, np.nan]),
            "b": np.array([0.0, 1.0, 1.0]),
            "c": np.array([[1.0], [1.0], [1.0]]),
        },
        ops.zeros((3, 1)),
    )
    np.testing.assert_array_equal(rows.labels, [0.0, 1.0, np.nan])
    assert rows.weights is None


def _flag_is_set(labels):
    return labels["flag"] > 0


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ({"defined": "flag"}, [1, 0, 0, 1]),
        ({"defined": ("flag", "other")}, [0, 0, 0, 1]),
        ({"defined": _flag_is_set}, [1, 0, 0, 1]),
        ({"skip_missing": True}, [1, 1, 0, 0]),
        ({"defined": "flag", "skip_missing": True}, [1, 0, 0, 0]),
        ({}, None),
    ],
)
def test_which_rows_are_defined(arguments, flags, shape):
    labels = {
        "a": np.array([1.0, 0.0, np.nan, np.nan]).reshape(shape),
        "flag": np.array([1.0, 0.0, np.nan, 2.0]).reshape(shape),
        "other": np.array([0, 0, 1, 1]).reshape(shape),
    }
    task = Task("a", **arguments)
    rows = task.rows(labels, ops.zeros((4, 1)))
    if flags is None:
        assert rows.weights is None
        return
    np.testing.assert_array_equal(rows.weights, flags)
    # A row that is defined keeps its label, and others have one that a loss can take.
    present = np.isfinite(ops.convert_to_numpy(rows.labels))
    assert present.tolist() == [True, True, True, "skip_missing" in arguments]


def test_labels_of_any_dtype():
    """Integers and bools are labels, and a float64 key decides about rows."""
    tasks = [Task("seen"), Task("kind", heads.MultiClass(3), defined="seen")]
    model, y = model_of(tasks), _labels()
    found = [
        model.evaluate(
            X,
            {"seen": SEEN.astype(first), "kind": y["kind"].astype(second)},
            verbose=0,
            return_dict=True,
        )
        for first, second in (("float32", "float32"), ("bool", "int64"))
    ]
    assert found[0] == found[1]


def test_a_loss_of_keras_and_metrics_of_the_prediction():
    """A name is exact; a loss with another reduction divides by the number of rows."""
    tasks = [
        Task("time", "regression", defined="seen", loss="mae", metrics=["mae"]),
        Task(
            "again",
            "regression",
            label="time",
            defined="seen",
            loss=keras.losses.MeanAbsoluteError(),
        ),
        Task("paid", "ziln", loss=None, metrics=["mse"], defined="seen"),
        Task("seen"),
    ]
    model, y = model_of(tasks), _labels()
    outputs = model.predict(X, verbose=0)
    found = model.evaluate(
        X, {k: y[k] for k in ("time", "seen", "paid")}, verbose=0, return_dict=True
    )
    errors = np.abs(y["time"] - outputs["time"][:, 0]) * SEEN
    np.testing.assert_allclose(found["time_loss"], errors.sum() / SEEN.sum(), rtol=1e-5)
    again = np.abs(y["time"] - outputs["again"][:, 0]) * SEEN
    np.testing.assert_allclose(found["again_loss"], again.sum() / 12, rtol=1e-5)
    np.testing.assert_allclose(found["time_mae"], errors.sum() / SEEN.sum(), rtol=1e-5)
    p, mu, sigma = outputs["paid"].astype("float64").T
    squares = (p * np.exp(mu + sigma**2 / 2) - y["paid"]) ** 2 * SEEN
    np.testing.assert_allclose(found["paid_mse"], squares.sum() / SEEN.sum(), rtol=1e-4)
    assert "paid_loss" not in found


def test_metrics_given_to_compile_count_the_defined_rows():
    """Next to those of the task, and each once; without weights under `metrics`."""
    task = Task("time", "regression", defined="seen", metrics=["mse"])
    model, y = model_of([task, Task("seen")]), _labels()
    mae = keras.metrics.MeanAbsoluteError
    model.compile(
        "sgd",
        metrics={"time": [mae(name="plain")]},
        weighted_metrics={"time": mae(name="weighted")},
        run_eagerly=EAGER,
    )
    errors = np.abs(y["time"] - model.predict(X, verbose=0)["time"][:, 0])
    y = {"time": np.where(SEEN > 0, y["time"], np.nan), "seen": SEEN}
    found = model.evaluate(
        X, y, sample_weight={"time": WEIGHTS}, verbose=0, return_dict=True
    )
    assert sorted(found) == sorted(
        ["loss", "seen_loss"]
        + [f"time_{x}" for x in ("defined", "loss", "mse", "plain", "weighted")]
    )
    rows = (SEEN > 0) & (WEIGHTS > 0)
    used = WEIGHTS * SEEN
    np.testing.assert_allclose(found["time_plain"], errors[rows].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        found["time_weighted"], (errors * used).sum() / used.sum(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task("a b"), "Received: 'a b'"),
        (lambda: Task("a", "softmax"), "`head` must be one of"),
        (lambda: Task("a", label=3), "`label` must be"),
        (lambda: Task("a", label=()), "`label` must be"),
        (lambda: Task("a", label=("a", 3)), "`label` must be"),
        (lambda: Task("a", defined=lambda y: y["a"] > 0), "a lambda for the task 'a'"),
        (lambda: Task("a", loss="msee"), "loss='msee' for the task 'a'"),
        (lambda: Task("a", metrics=["acu"]), "'acu' for the task 'a'"),
        (lambda: Task("a", metrics=[3]), "3 for the task 'a'"),
        (lambda: Task("a", defined=3), "`defined` must be .* the task 'a'"),
        (lambda: Task("a", defined=()), "`defined` must be .* the task 'a'"),
        (lambda: Task("a", defined=["b", 3]), "`defined` must be .* the task 'a'"),
        (lambda: Task("a", skip_missing="yes"), "`skip_missing`"),
        (lambda: Task("a", metrics="auc"), "`metrics` must be .* the task 'a'"),
        (lambda: Task("a", metrics=3), "`metrics` must be .* the task 'a'"),
        (lambda: Task("a", loss="nothing"), "nothing"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("head", "label", "rule"),
    [
        ("binary", 2.0, r"in \[0, 1\]"),
        ("binary", np.nan, r"in \[0, 1\]"),
        ("regression", np.inf, "finite"),
        ("ziln", -1.0, "a finite number >= 0"),
        (heads.Ordinal(5), 5.0, r"an integer in \[0, 5\)"),
        (heads.MultiClass(3), 0.5, r"an integer in \[0, 3\)"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "validation"])
def test_labels_out_of_range_name_task_and_rule(head, label, rule, method):
    model = model_of([Task("a", head, defined="seen"), Task("seen")])
    good = {"a": np.zeros(12), "seen": SEEN}
    bad = {**good, "a": np.where(np.arange(12) == 3, label, 0.0)}
    bad["seen"] = np.ones(12)
    message = f"labels of the task 'a' must be {rule} .*Received: {label} in row 3"
    run = {
        "fit": lambda y: model.fit(X, y, verbose=0),
        "evaluate": lambda y: model.evaluate(X, y, verbose=0),
        "train_on_batch": lambda y: model.train_on_batch(X, y),
        "validation": lambda y: model.fit(X, good, validation_data=(X, y), verbose=0),
    }[method]
    with pytest.raises(ValueError, match=message):
        run(bad)
    if method == "evaluate":
        run({**bad, "seen": (np.arange(12) != 3).astype("float32")})


def test_a_task_without_a_positive_row():
    """The loss is that of the oracle, an AUC 0 as in Keras, and training is finite."""
    task = Task("a", metrics=[keras.metrics.AUC(name="auc")])
    model, y = model_of([task]), {"a": np.zeros(12)}
    outputs = model.predict(X, verbose=0)["a"]
    wanted = task_oracles.mean(task_oracles.binary, y["a"], outputs)
    history = model.fit(X, y, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["a_loss"][0], wanted, rtol=1e-5)
    assert np.isfinite(history["loss"]).all()


def test_config_round_trip():
    task = Task(
        "paid",
        heads.Ordinal(4),
        label=("a", "b"),
        defined=bought,
        skip_missing=True,
        loss=keras.losses.Huber(),
        metrics=["mae", keras.metrics.AUC(name="x")],
    )
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(task)
    )
    assert again.get_config() == task.get_config()
    assert again.defined is bought
    assert again.label_keys == ("a", "b")
    assert again.keys == {"a", "b"}
    assert isinstance(again.loss, keras.losses.Huber)
    assert [metric.name for metric in again.metrics] == [
        metric.name for metric in task.metrics
    ]
    for loss in ("head", None):
        task = Task("a", "ziln", loss=loss, defined="b")
        again = Task.from_config(task.get_config())
        assert again.defined == "b"
        assert type(again.loss) is type(task.loss)
        assert again.keys == {"a", "b"}
        assert repr(again) == "Task('a', ZILN())"


def test_several_keys_in_a_config():
    task = Task("a", defined=["b", "c"])
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(task)
    )
    assert again.defined == task.defined == ("b", "c")
    assert again.keys == {"a", "b", "c"}
