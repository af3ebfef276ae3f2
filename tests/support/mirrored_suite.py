"""Models under `MirroredStrategy`, which `tests/test_mirrored.py` runs in a process.

Two logical processors must be made before TensorFlow starts. In `run` both replicas get
the same rows, so that a step is that of one device on these rows; in `run_halves` each
gets one half.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_moe import metrics
from keras_moe.layers import MMoE, MoE, Tower
from keras_moe.multitask import ESCM2, MultiTaskModel, Task, UncertaintyWeighting
from keras_moe.routers import BiasBalancedRouter
from tests.support import mirrored_layers

ROWS = 16
MEAN = "mean_with_sample_weight"


def build(weighting: bool, router: str) -> MultiTaskModel:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = MoE(
        4,
        (8, 6),
        router=router,
        load_balancing_loss_weight=5.0,
        kernel_regularizer="l2",
    )(inputs)
    shared = MMoE(3, 5, ["click", "stars", "seen"])(hidden)
    model = MultiTaskModel(
        inputs,
        {
            "click": Tower((), "sigmoid")(shared["click"]),
            "stars": Tower(())(shared["stars"]),
            "seen": Tower((), "sigmoid")(shared["seen"]),
        },
        UncertaintyWeighting() if weighting else None,
    )
    model.compile(
        keras.optimizers.SGD(0.1),
        {
            "click": keras.losses.BinaryCrossentropy(reduction="sum_over_batch_size"),
            "stars": keras.losses.MeanSquaredError(reduction=MEAN),
            "seen": keras.losses.BinaryCrossentropy(reduction=MEAN),
        },
        weighted_metrics={"click": ["mae"]},
    )
    return model


def run(weighting: bool, router: str, strategy: tf.distribute.Strategy) -> dict:
    replicas = strategy.num_replicas_in_sync
    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
    clicked = (x[:, :1] > 0).astype("float32")
    rows = (
        x,
        {"click": clicked, "stars": 3 + x[:, 1:2], "seen": clicked},
        # Stars are known of some rows, and "seen" of none.
        {"stars": (x[:, 2] > 0).astype("float32"), "seen": np.zeros(ROWS)},
    )
    x, y, weights = keras.tree.map_structure(
        lambda part: np.concatenate([part] * replicas), rows
    )
    with strategy.scope():
        model = build(weighting, router)
    batch = {"batch_size": ROWS * replicas, "verbose": 0}
    history = model.fit(
        x, y, sample_weight=weights, epochs=3, shuffle=False, **batch
    ).history
    measured = model.evaluate(x, y, sample_weight=weights, return_dict=True, **batch)
    return {
        "history": history,
        "measured": measured,
        "weights": [np.asarray(w).tolist() for w in model.get_weights()],
    }


def run_halves(strategy: tf.distribute.Strategy) -> dict:
    """Train a bias that balances: the load of a step is that of both halves."""
    x = np.random.default_rng(1).normal(size=(2 * ROWS, 6)).astype("float32")
    # The halves like different experts, so that neither load is that of the whole.
    x[:ROWS] += 1.0
    with strategy.scope():
        keras.utils.set_random_seed(0)
        router = BiasBalancedRouter(4, 2, bias_update_rate=0.1)
        model = keras.Sequential(
            [keras.Input((6,)), MoE(4, (8, 1), router=router, name="moe")]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, x[:, :1], epochs=5, batch_size=2 * ROWS, shuffle=False, verbose=0)
    return {
        "bias": np.asarray(router.expert_bias).tolist(),
        "weights": [np.asarray(w).tolist() for w in model.get_weights()],
    }


def run_one_sided(strategy: tf.distribute.Strategy) -> dict:
    """A task that only the rows of the first replica know."""
    x = np.random.default_rng(1).normal(size=(2 * ROWS, 6)).astype("float32")
    known = np.repeat([1.0, 0.0], ROWS)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        outputs = {task: Tower((), name=task)(inputs) for task in ("all", "half")}
        model = MultiTaskModel(inputs, outputs, UncertaintyWeighting())
        model.compile(keras.optimizers.SGD(0.1), "mse")
    y = {"all": x[:, :1], "half": 3 + x[:, 1:2]}
    history = model.fit(
        x,
        y,
        sample_weight={"half": known},
        batch_size=2 * ROWS,
        epochs=3,
        shuffle=False,
        verbose=0,
    ).history
    weights = [np.asarray(w).tolist() for w in model.get_weights()]
    return {"history": history, "weights": weights}


def run_metrics(strategy: tf.distribute.Strategy) -> dict:
    """Metrics of rows that differ between the replicas, with groups across both."""
    rng = np.random.default_rng(2)
    x = {
        "features": rng.normal(size=(4 * ROWS, 6)).astype("float32"),
        "user": rng.integers(0, 5, 4 * ROWS).astype("int32"),
    }
    y = {"click": (x["features"][:, :1] > 0).astype("float32")}
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = {"features": keras.Input((6,), name="features")}
        click = Tower((), "sigmoid", name="click")(inputs["features"])
        model = MultiTaskModel(inputs, {"click": click})
        model.compile(
            keras.optimizers.SGD(0.1),
            "binary_crossentropy",
            weighted_metrics={
                "click": [
                    metrics.GAUC(group="user", max_rows=4 * ROWS),
                    metrics.XAUC(max_rows=4 * ROWS),
                    metrics.RankAUC(),
                    metrics.PCOC(),
                    metrics.ExpectedCalibrationError(),
                ]
            },
        )
    return model.evaluate(x, y, batch_size=2 * ROWS, verbose=0, return_dict=True)


def run_tasks(weighting: str | None, strategy: tf.distribute.Strategy) -> dict:
    """Declared tasks whose defined rows are few on one replica, many on the other."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2 * ROWS, 6)).astype("float32")
    x[ROWS:] += 0.5
    seen = np.where(np.arange(2 * ROWS) < ROWS, x[:, 0] > 1, x[:, 0] > -1)
    y = {
        "seen": seen.astype("float32"),
        "time": np.where(seen, 3 * x[:, 1], np.nan).astype("float32"),
        "never": np.full(2 * ROWS, np.nan, "float32"),
    }
    tasks = [
        Task("seen", metrics=[keras.metrics.AUC(name="auc")]),
        Task("time", "regression", defined="seen", metrics=["mae"]),
        Task("never", "regression", skip_missing=True),
    ]
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        ids = keras.ops.cast(inputs > 0, "int32")
        looked_up = keras.layers.Flatten()(keras.layers.Embedding(2, 3)(ids))
        hidden = keras.layers.Dense(4, "tanh", kernel_regularizer="l2")(
            keras.layers.Concatenate()([inputs, looked_up])
        )
        outputs = {task.name: task.tower()(hidden) for task in tasks}
        model = MultiTaskModel(inputs, outputs, weighting, tasks=tasks)
        model.compile(keras.optimizers.SGD(0.1))
    batch = {"batch_size": 2 * ROWS, "verbose": 0}
    history = model.fit(x, y, epochs=3, shuffle=False, **batch).history
    return {
        "history": history,
        "measured": model.evaluate(x, y, return_dict=True, **batch),
        "weights": [np.asarray(w).tolist() for w in model.trainable_variables],
    }


def run_clicks(strategy: tf.distribute.Strategy) -> dict:
    """A loss over all impressions, with few clicks on one replica."""
    x = np.random.default_rng(4).normal(size=(2 * ROWS, 6)).astype("float32")
    clicks = np.where(np.arange(2 * ROWS) < ROWS, x[:, 0] > 1, x[:, 0] > -1)
    y = {
        "click": clicks.astype("float32"),
        "conversion": np.where(clicks, x[:, 1] > 0, np.nan).astype("float32"),
    }
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        escm2 = ESCM2(method="dr")
        logits = {name: Tower(4)(inputs) for name in escm2.input_names}
        model = MultiTaskModel(inputs, escm2(logits), tasks=escm2.declared_tasks())
        model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(
        x, y, batch_size=2 * ROWS, epochs=3, shuffle=False, verbose=0
    ).history
    weights = [np.asarray(w).tolist() for w in model.get_weights()]
    return {"history": history, "weights": weights}


def refused(strategy: tf.distribute.Strategy) -> list[str]:
    """Return the errors of a model, and of a layer in it, with `jit_compile=True`."""
    found = []
    for kind in (MultiTaskModel, keras.Model):
        with strategy.scope():
            inputs = keras.Input((6,))
            outputs = {"click": MMoE(2, 1, 1)(inputs)[0]}
            model = kind(inputs, outputs)
            try:
                model.compile("sgd", {"click": "mse"}, jit_compile=True)
                model.fit(np.ones((8, 6)), {"click": np.ones((8, 1))}, verbose=0)
            except ValueError as error:
                found.append(str(error))
    return found


def main(quick: bool) -> None:
    processor = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        processor, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    # One for all: a second one would take part in the collectives of the first.
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    both = (tf.distribute.get_strategy(), mirrored)
    found: dict = {"halves": [run_halves(strategy) for strategy in both]}
    cases = [(w, r) for w in (True, False) for r in ("top_k", "bias_balanced")]
    for weighting, router in cases[:1] if quick else cases:
        found[f"{weighting}, {router}"] = [run(weighting, router, s) for s in both]
    if not quick:
        run_others(found, mirrored)
    json.dump(found, sys.stdout)


def run_others(found: dict, mirrored: tf.distribute.Strategy) -> None:
    both = (tf.distribute.get_strategy(), mirrored)
    for weighting in (None, "pcgrad", "upgrad"):
        found[f"tasks, {weighting}"] = [run_tasks(weighting, s) for s in both]
    found["clicks"] = [run_clicks(strategy) for strategy in both]
    found["one-sided"] = [run_one_sided(strategy) for strategy in both]
    found["metrics"] = [run_metrics(strategy) for strategy in both]
    found["layers"] = [mirrored_layers.by_halves(), mirrored_layers.mirrored(mirrored)]
    found["refused"] = refused(mirrored)


if __name__ == "__main__":
    main(quick="quick" in sys.argv)
