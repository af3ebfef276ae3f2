"""`ExpertMonitor` in `fit`: figures in logs, files and pictures."""

import json

import keras
import numpy as np
import pytest

from keras_moe import layers, multitask, telemetry
from keras_moe.callbacks import ExpertMonitor

BACKEND = keras.backend.backend()
TASKS = ["click", "stars"]
X = np.random.default_rng(0).normal(size=(96, 6)).astype("float32")
Y = {"click": (X[:, :1] > 0).astype("float32"), "stars": X[:, 1:2]}


def two_tasks(**options):
    inputs = keras.Input((6,))
    hidden = layers.MoE(4, (8, 6), name="moe")(inputs)
    shared = layers.PLE(2, 1, 1, (8, 4), TASKS, name="ple")(hidden)
    outputs = {"click": layers.Tower((), "sigmoid")(shared["click"])}
    outputs["stars"] = layers.Tower(())(shared["stars"])
    model = multitask.MultiTaskModel(inputs, outputs)
    losses = {"click": "binary_crossentropy", "stars": "mse"}
    model.compile("adam", losses, **options)
    return model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    model = two_tasks(jit_compile=BACKEND != "torch")
    with_board = BACKEND == "tensorflow"
    monitor = ExpertMonitor(
        *(X[:40], {task: labels[:40] for task, labels in Y.items()}),
        file=folder / "new" / "experts.jsonl",
        log_dir=folder / "board" if with_board else None,
    )
    history = model.fit(
        X, Y, batch_size=16, epochs=2, callbacks=[monitor], verbose=0
    ).history
    return monitor, history, folder


def test_every_mixture_is_in_the_logs(fitted):
    _, history, _ = fitted
    for name in ("moe_load_cv", "moe_least_used", "moe_entropy", "moe_dropped"):
        assert len(history[name]) == 2
    for name in ("ple_level_0_zero_activations", "ple_level_1_largest_weight"):
        assert 0 < history[name][-1] <= 1
    assert -1 <= history["lowest_gradient_cosine"][-1] <= 1
    assert "ple_level_0_load_cv" not in history  # Not comparable.


def test_observations_have_the_arrays(fitted):
    monitor, history, _ = fitted
    assert [seen["step"] for seen in monitor.observations] == [6, 12]
    last = monitor.observations[-1]
    assert set(last["mixtures"]) == {"moe", "ple/level_0", "ple/level_1"}
    moe = last["mixtures"]["moe"]
    assert (moe["rows"], moe["top_k"]) == (40, 2)
    np.testing.assert_allclose(moe["load"].sum(), 1.0, rtol=1e-5)
    cosines = last["gradient_cosines"]
    assert history["lowest_gradient_cosine"][-1] == pytest.approx(cosines[0, 1])
    assert monitor.seconds > 0


def test_lines_of_json(fitted):
    monitor, _, folder = fitted
    lines = (folder / "new" / "experts.jsonl").read_text().splitlines()
    first, last = (json.loads(line) for line in lines)
    assert (first["epoch"], last["epoch"]) == (0, 1)
    expected = monitor.observations[-1]["mixtures"]["moe"]["load"]
    np.testing.assert_allclose(last["mixtures"]["moe"]["load"], expected, atol=1e-5)
    assert last["mixtures"]["ple/level_0"]["load_cv"] is None


def events(folder):
    """Yield the step and tag of each value that TensorBoard has."""
    import tensorflow as tf

    (path,) = folder.glob("events*")
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            yield event.step, value.tag


@pytest.mark.skipif(BACKEND != "tensorflow", reason="written there")
def test_events_of_tensorboard(fitted):
    _, _, folder = fitted
    assert {
        "experts/moe_load_cv",
        "moe/load/expert_3",
        "moe/gates",
        "ple/level_0/output_similarity",
        "ple/level_1/largest_weight/click",
    } <= {tag for _, tag in events(folder / "board")}


class Interrupt(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


@pytest.mark.skipif(BACKEND != "tensorflow", reason="written there")
@pytest.mark.parametrize(("share", "steps"), [(0.0, [6, 18]), (1.0, [6, 12, 18])])
def test_pictures_take_a_share_of_the_time(share, steps, tmp_path, monkeypatch):
    """With a share of 0: those of the first and of the last observation."""
    monkeypatch.setattr("keras_moe.callbacks._tensorboard._SHARE", share)
    monitor = ExpertMonitor(X[:40], log_dir=tmp_path)
    model = two_tasks()
    with pytest.raises(InterruptedError):
        model.fit(X, Y, 16, epochs=4, callbacks=[monitor, Interrupt()], verbose=0)
    monitor.on_train_begin()  # Of the next `fit`.
    monitor.on_train_end()
    found = list(events(tmp_path))
    assert [step for step, tag in found if tag == "moe/gates"] == steps
    assert [step for step, tag in found if tag == "moe/load/expert_0"] == [6, 12, 18]


def test_every_steps():
    monitor = ExpertMonitor(X, every_steps=4)
    model = two_tasks()
    history = model.fit(X, Y, batch_size=16, epochs=2, callbacks=[monitor], verbose=0)
    assert [seen["step"] for seen in monitor.observations] == [4, 8, 12]
    assert len(history.history["moe_load_cv"]) == 2


def test_a_second_fit_goes_on_counting():
    monitor = ExpertMonitor(X)
    model = two_tasks()
    for first in (0, 2):
        options = {"initial_epoch": first, "epochs": first + 2, "verbose": 0}
        model.fit(X, Y, batch_size=16, callbacks=[monitor], **options)
    assert [seen["step"] for seen in monitor.observations] == [18, 24]
    assert [seen["epoch"] for seen in monitor.observations] == [2, 3]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has one step")
def test_several_steps_an_execution():
    monitor = ExpertMonitor(X, every_steps=4)
    model = two_tasks(steps_per_execution=3)
    model.fit(X, Y, batch_size=8, epochs=1, callbacks=[monitor], verbose=0)
    assert [seen["step"] for seen in monitor.observations] == [6, 9, 12]


def test_training_is_the_same_with_a_monitor():
    found = []
    for callbacks in ([], [ExpertMonitor(X, Y)]):
        keras.utils.set_random_seed(0)
        model = two_tasks()
        history = model.fit(X, Y, batch_size=16, callbacks=callbacks, verbose=0).history
        weights = [keras.ops.convert_to_numpy(w) for w in model.weights]
        found.append((history["loss"], history["click_loss"], weights))
    assert found[0][:2] == found[1][:2]
    for one, other in zip(found[0][2], found[1][2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's strategy")
def test_under_a_mirrored_strategy():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy().scope():
        model = two_tasks()
    monitor = ExpertMonitor(X, Y)
    history = model.fit(X, Y, callbacks=[monitor], verbose=0).history
    assert len(history["moe_load_cv"]) == 1
    expected = telemetry.gradient_conflict(model, X, Y)
    found = monitor.observations[-1]["gradient_cosines"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    for wrong in (np.float32(1), np.zeros((0, 6)), [X, X[:3]]):
        with pytest.raises(ValueError, match="`x` must be an array"):
            ExpertMonitor(wrong)
    with pytest.raises(ValueError, match="`every_steps`"):
        ExpertMonitor(X, every_steps=0)
    with pytest.raises(ValueError, match=r"`y` must be.*as many as `x`: 96"):
        ExpertMonitor(X, {task: labels[:5] for task, labels in Y.items()})
    with pytest.raises(ValueError, match="`sample_weight` must be None without `y`"):
        ExpertMonitor(X, None, X[:, 0])
    inputs = keras.Input((6,))
    dense = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    dense.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must have a mixture"):
        dense.fit(X, Y["stars"], callbacks=[ExpertMonitor(X)], verbose=0)
    one = keras.Model(inputs, layers.MoE(4, 1)(inputs))
    one.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`y` must be None unless"):
        one.fit(X, Y["stars"], callbacks=[ExpertMonitor(X, Y["stars"])], verbose=0)
    with pytest.raises(ValueError, match=r"`x` must be an array.*type _Iterable"):
        ExpertMonitor(_Iterable())
    import importlib.util

    find = importlib.util.find_spec
    for package in ("tensorflow", "tensorboard", "matplotlib"):
        monkeypatch.setattr(
            *(importlib.util, "find_spec"),
            lambda name, lacks=package: None if name == lacks else find(name),
        )
        with pytest.raises(ImportError, match=f"pip install {package}"):
            ExpertMonitor(X, log_dir=tmp_path)


class _Iterable:
    def __iter__(self):
        return iter([X])


def test_what_fails_later_fails_when_fit_begins(tmp_path):
    model = two_tasks()
    for monitor, message in (
        (ExpertMonitor(X, file=tmp_path), "`file` must be a file"),
        (ExpertMonitor(X, {"click": Y["click"]}), "stars"),
    ):
        with pytest.raises((ValueError, KeyError), match=message):
            model.fit(X, Y, callbacks=[monitor], verbose=0)
    assert model.optimizer.iterations == 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's programs")
def test_a_model_with_a_program_of_its_own_is_named():
    import tensorflow as tf

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.moe = layers.MoE(4, 1, name="moe")

        @tf.function
        def call(self, x):
            return self.moe(x)

    model = Own()
    model(X)
    with pytest.raises(ValueError, match=r"calls none of \['.*moe'\]"):
        telemetry.observe(model, X)
    with pytest.raises(ValueError, match=r"moe cannot be observed.*tf\.function"):
        telemetry.observe(model, X[:3])  # traced anew
