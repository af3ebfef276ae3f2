"""The metrics of rankers in `fit`, files and configs."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import metrics
from keras_moe.callbacks import CombinedMonitor
from keras_moe.layers import SharedBottom, Tower
from keras_moe.metrics import (
    GAUC,
    PCOC,
    XAUC,
    ByGroup,
    BySegment,
    ExpectedCalibrationError,
    NormalizedEntropy,
    RankAUC,
)
from keras_moe.multitask import MultiTaskModel

N = 96
RNG = np.random.default_rng(0)
X = {
    "features": RNG.normal(size=(N, 4)).astype("float32"),
    "user": RNG.integers(0, 9, N).astype("int32"),
    "page": RNG.integers(0, 2, N).astype("int32"),
}
Y = {
    "click": (X["features"][:, :1] > 0).astype("float32"),
    "stars": X["features"][:, 1:2],
}
COMPILERS = (False,) if keras.backend.backend() == "torch" else (False, True)


def _model():
    inputs = {"features": keras.Input((4,), name="features")}
    shared = SharedBottom(8, ["click", "stars"])(inputs["features"])
    outputs = {
        "click": Tower((), "sigmoid", name="click")(shared["click"]),
        "stars": Tower((), name="stars")(shared["stars"]),
    }
    return MultiTaskModel(inputs, outputs)


def _fresh():
    return [
        GAUC(group="user", max_rows=N),
        RankAUC(),
        NormalizedEntropy(),
        PCOC(),
        ExpectedCalibrationError(),
        BySegment(PCOC(), 2, group="page"),
    ]


@pytest.mark.parametrize("jit", COMPILERS)
def test_fit_and_evaluate_give_the_figures_of_all_rows(jit):
    model = _model()
    model.compile(
        keras.optimizers.SGD(0.0),
        loss={"click": "binary_crossentropy", "stars": "mse"},
        weighted_metrics={"click": _fresh(), "stars": [XAUC(max_rows=N)]},
        jit_compile=jit,
    )
    logs = model.fit(X, Y, batch_size=32, verbose=0).history
    predicted = model.predict(X, verbose=0)
    found = model.evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)
    expected = {}
    for metric in _fresh():
        groups = {"groups": X[metric.group]} if hasattr(metric, "group") else {}
        metric.update_state(Y["click"], predicted["click"], **groups)
        result = metric.result()
        results = result if isinstance(result, dict) else {metric.name: result}
        expected |= {f"click_{name}": float(value) for name, value in results.items()}
    xauc = XAUC()
    xauc.update_state(Y["stars"], predicted["stars"])
    expected["stars_xauc"] = float(xauc.result())
    for name, value in expected.items():
        name = name.replace("click_pcoc_", "pcoc_")
        assert found[name] == pytest.approx(value, rel=1e-4), name
        assert logs[name] == [pytest.approx(value, rel=1e-4)], name


def test_a_group_that_is_no_feature_is_an_error():
    model = _model()
    model.compile("sgd", "mse", metrics={"click": [GAUC(group="session")]})
    with pytest.raises(ValueError, match=r"`group` of.*'gauc'.*'session'.*'user'"):
        model.evaluate(X, Y, verbose=0)


@pytest.mark.parametrize(
    "groups", [None, np.zeros(2, "float32"), np.zeros(5, "int32")], ids=str
)
def test_groups_are_checked(groups):
    with pytest.raises(ValueError, match="`groups` must"):
        GAUC().update_state([0, 1], [0.1, 0.2], groups=groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: GAUC(group_weight="sum"), "`group_weight` must be one of"),
        (lambda: GAUC(max_rows=0), "`max_rows` must be an integer >= 1"),
        (lambda: RankAUC(num_bins=1), "`num_bins` must be >= 2"),
        (lambda: RankAUC(from_logits=1), "`from_logits` must be True or False"),
        (lambda: ExpectedCalibrationError(0), "`num_bins` must be an integer >= 1"),
        (lambda: BySegment("pcoc", 2), "`metric` must be a Keras metric"),
        (lambda: BySegment(PCOC(), 0), "`segments` must be an integer >= 1"),
        (lambda: BySegment(PCOC(), ["a", "a"]), "`segments` must be.*different"),
        (lambda: ByGroup("ndcg"), "`metric` must be a Keras metric"),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        arguments()


MADE = [
    GAUC("user", "positives", 10, "mine"),
    XAUC(10, "mine"),
    RankAUC(True, 128, "mine"),
    NormalizedEntropy(True, "mine"),
    PCOC(True, "mine"),
    ExpectedCalibrationError(5, True, "mine"),
    BySegment(PCOC(True), ["a", "b"], "page", "mine"),
    ByGroup(keras.metrics.MeanSquaredError(), "user", 10, "mine"),
]


@pytest.mark.parametrize("metric", MADE, ids=lambda metric: type(metric).__name__)
def test_configs_make_the_same_metric(metric):
    config = keras.saving.serialize_keras_object(metric)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(metric)
    assert copy.get_config() == metric.get_config()
    assert copy.name == "mine"
    assert type(metric).__name__ in metrics.__all__


def test_a_compiled_model_with_metrics_is_saved_and_loaded(tmp_path):
    model = _model()
    model.compile(
        "sgd",
        loss={"click": "binary_crossentropy", "stars": "mse"},
        weighted_metrics={"click": [GAUC(group="user"), RankAUC()]},
    )
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    found = loaded.evaluate(X, Y, verbose=0, return_dict=True)
    assert found == pytest.approx(model.evaluate(X, Y, verbose=0, return_dict=True))


def test_a_combined_figure_stops_and_chooses(tmp_path):
    model = _model()
    model.compile(
        keras.optimizers.Adam(0.05),
        loss={"click": "binary_crossentropy", "stars": "mse"},
        weighted_metrics={"click": [RankAUC()]},
    )
    combined = CombinedMonitor(
        {"val_click_rank_auc": 1.0, "val_stars_loss": -0.1}, name="val_combined"
    )
    path = tmp_path / "best.keras"
    history = model.fit(
        X,
        Y,
        validation_data=(X, Y),
        epochs=4,
        verbose=0,
        callbacks=[
            combined,
            keras.callbacks.ModelCheckpoint(
                path, monitor="val_combined", mode="max", save_best_only=True
            ),
        ],
    ).history
    expected = np.array(history["val_click_rank_auc"]) - 0.1 * np.array(
        history["val_stars_loss"]
    )
    np.testing.assert_allclose(history["val_combined"], expected, rtol=1e-6)
    assert path.exists()


def test_the_worst_relative_change_is_that_of_the_worst_task():
    monitor = CombinedMonitor({"auc": 1.0, "loss": -1.0}, "worst_relative_change")
    found = []
    for auc, loss in ((0.5, 2.0), (0.6, 2.2), (0.55, 1.0)):
        logs = {"auc": auc, "loss": loss}
        monitor.on_epoch_end(0, logs)
        found.append(logs["combined"])
    # 0.6 is 20% better, 2.2 10% worse; then 10% and 50% better.
    assert found == pytest.approx([0.0, -0.1, 0.1])
    monitor.on_train_begin()
    logs = {"auc": 0.7, "loss": 1.0}
    monitor.on_epoch_end(0, logs)
    assert logs["combined"] == 0.0


def test_a_product_of_powers():
    monitor = CombinedMonitor({"a": 2.0, "b": -1.0}, "product", "score")
    logs = {"a": 3.0, "b": 4.0}
    monitor.on_epoch_end(0, logs)
    assert logs["score"] == pytest.approx(9 / 4)
    with pytest.raises(ValueError, match=r"> 0 for rule=\"product\".*b=-1"):
        monitor.on_epoch_end(0, {"a": 3.0, "b": -1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "`weights` must be a dict"),
        ((["auc"],), "`weights` must be a dict"),
        (({"auc": float("nan")},), r"`weights\['auc'\]` must be a finite number"),
        (({"auc": 1.0}, "mean"), "`rule` must be one of"),
    ],
)
def test_invalid_arguments_of_the_monitor_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CombinedMonitor(*arguments)


def test_an_entry_that_the_logs_lack_is_named():
    with pytest.raises(ValueError, match=r"'val_auc'; the logs have \['loss'\]"):
        CombinedMonitor({"val_auc": 1.0}).on_epoch_end(0, {"loss": 1.0})


def test_results_are_tensors_of_float32():
    metric = GAUC()
    metric.update_state([0, 1], [0.1, 0.2], groups=[1, 1])
    assert keras.backend.standardize_dtype(metric.result().dtype) == "float32"
    assert float(ops.convert_to_numpy(metric.result())) == 1.0
