"""Training steps with a gradient for every task, against vectors in NumPy."""

import keras
import numpy as np
import pytest

from keras_moe.multitask import JointLoss, MultiTaskModel, Task, gradients
from tests.support import gradient_oracles
from tests.support.checks import not_on_jax
from tests.support.declared import (
    EAGER,
    assert_near,
    features,
    model_of,
    set_weights,
    weights_of,
)

BACKEND = keras.backend.backend()
X = features(10)
ORACLES = {
    "pcgrad": gradient_oracles.pcgrad,
    "mgda": gradient_oracles.mgda,
}


def _tasks(defined=None):
    return [Task("a", "regression", defined=defined), Task("b", "regression")]


def _labels(conflict):
    """Labels of b that are those of a, or their opposite."""
    a = 2 * X[:, 0] - X[:, 1] + 1
    return {"a": a, "b": (-a if conflict else a) + 0.3 * X[:, 2]}


def _wanted(model, y, used, combine, rate):
    """All weights after a step of SGD; `rate` is its learning rate."""
    kernel, bias, *towers = [w.astype("float64") for w in model.get_weights()[:6]]
    pairs = [(towers[0], towers[1]), (towers[2], towers[3])]
    found = gradient_oracles.gradients(
        X.astype("float64"), kernel, bias, pairs, [y["a"], y["b"]], used
    )
    shared = combine([np.concatenate([k.ravel(), b]) for k, b, _, _ in found])
    by_kernel = shared[: kernel.size].reshape(kernel.shape)
    steps = [by_kernel, shared[kernel.size :]]
    steps += [part for _, _, w, b in found for part in (w, b)]
    return [w - rate * g for w, g in zip([kernel, bias, *towers], steps, strict=True)]


def _same_towers(model):
    """Give both towers the same weights: then opposite labels conflict."""
    rng = np.random.default_rng(5)
    tower = [rng.normal(size=(3, 1)), np.zeros(1)]
    shared = [rng.normal(size=(4, 3)) * 0.5, np.zeros(3)]
    model.get_layer("shared").set_weights(shared)
    for name in ("a_tower", "b_tower"):
        model.get_layer(name).set_weights(tower)


@pytest.mark.parametrize("conflict", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_a_step_is_that_of_the_vectors(name, conflict):
    """Shared variables get the combination, those of a task their own gradient.

    For two tasks PCGrad is the same in any order.
    """
    model = model_of(_tasks(), name, keras.optimizers.SGD(0.1))
    _same_towers(model)
    y, everything = _labels(conflict), np.ones(len(X))
    for _ in range(2):
        wanted = _wanted(model, y, [everything] * 2, ORACLES[name], 0.1)
        model.fit(X, y, verbose=0, shuffle=False)
        # The solver of MGDA is iterative.
        tolerance = 1e-3 if name == "mgda" else 1e-5
        assert_near(model.get_weights()[:6], wanted, tolerance, tolerance * 0.1)


def test_the_labels_conflict():
    """What the test above is about: one product is negative, the other is not."""
    model = model_of(_tasks(), "pcgrad")
    _same_towers(model)
    kernel, bias, *towers = model.get_weights()[:6]
    pairs = [(towers[0], towers[1]), (towers[2], towers[3])]
    for conflict in (False, True):
        y = _labels(conflict)
        found = gradient_oracles.gradients(
            X, kernel, bias, pairs, [y["a"], y["b"]], [np.ones(len(X))] * 2
        )
        first, second = (np.concatenate([k.ravel(), b]) for k, b, _, _ in found)
        assert (first @ second < 0) == conflict


def _after(model, start, y, **kwargs):
    set_weights(model, start)
    model.fit(X, y, verbose=0, shuffle=False, **kwargs)
    return weights_of(model)[: len(model.trainable_variables)]


def test_without_conflict_pcgrad_is_the_sum():
    plain = model_of(_tasks(), None)
    model = model_of(_tasks(), "pcgrad")
    for one in (plain, model):
        _same_towers(one)
    y = _labels(False)
    found = [_after(one, weights_of(one), y, epochs=3) for one in (plain, model)]
    assert_near(found[1], found[0], 1e-6, 1e-7)


@pytest.mark.parametrize(
    "name",
    [
        k if k == "pcgrad" else pytest.param(k, marks=not_on_jax)
        for k in gradients.KNOWN
    ],
)
def test_one_task_is_plain_keras(name):
    task = [Task("a", "regression", metrics=["mae"])]
    y, found = {"a": _labels(False)["a"]}, []
    for weighting in (None, name):
        model = model_of(task, weighting, keras.optimizers.Adam(0.05))
        found.append(_after(model, weights_of(model), y, epochs=2, batch_size=5))
    assert_near(found[1], found[0], 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "upgrad"])
def test_an_undefined_task_has_no_say(name):
    """Its gradient is 0, not NaN, and the others have the gradient of their loss."""
    model = model_of(_tasks(defined="seen"), name, keras.optimizers.SGD(0.1))
    y = {**_labels(True), "seen": np.zeros(len(X))}
    y["a"] = np.full(len(X), np.nan)
    used = [np.zeros(len(X)), np.ones(len(X))]
    labels = {"a": np.zeros(len(X)), "b": y["b"]}
    wanted = _wanted(model, labels, used, gradient_oracles.total, 0.1)
    history = model.fit(X, y, verbose=0).history
    assert history["a_loss"] == history["a_defined"] == [0.0]
    assert_near(model.get_weights()[:6], wanted, 1e-5)


def test_shared_layers_may_be_named():
    """With none of them shared, a step is that of the sum."""
    y, found = _labels(True), {}
    for name, weighting, shared in (
        ("found", "pcgrad", None),
        ("named", "pcgrad", ["shared"]),
        ("towers", "pcgrad", ["a_tower"]),
        ("sum", None, None),
    ):
        model = model_of(_tasks(), weighting, shared_layers=shared)
        _same_towers(model)
        found[name] = _after(model, weights_of(model), y)
    assert_near(found["named"], found["found"], 0, 0)
    assert_near(found["towers"], found["sum"], 1e-6, 1e-7)
    assert not np.allclose(found["sum"][0], found["found"][0], atol=1e-4)


@not_on_jax
def test_regularizers_and_added_losses_count_once():
    """A step with them is that without, less their gradient: rate * 2 * l2 * W."""
    y, found, kernels = _labels(True), [], []
    for l2 in (0.0, 0.5):
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(
            3,
            kernel_initializer=keras.initializers.GlorotUniform(seed=0),
            kernel_regularizer=keras.regularizers.L2(l2) if l2 else None,
        )(inputs)
        hidden = keras.layers.ActivityRegularization(l2=0.0)(hidden)
        outputs = {
            t.name: t.tower((), kernel_initializer="ones")(hidden) for t in _tasks()
        }
        model = MultiTaskModel(inputs, outputs, "pcgrad", tasks=_tasks())
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGER)
        kernels.append(model.get_weights()[0])
        history = model.fit(X, y, verbose=0).history
        found.append((history["loss"][0], model.get_weights()))
    np.testing.assert_allclose(
        found[1][1][0],
        found[0][1][0] - 0.1 * 2 * 0.5 * kernels[0],
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        found[1][0], found[0][0] + 0.5 * (kernels[0] ** 2).sum(), rtol=1e-5
    )
    assert_near(found[1][1][1:6], found[0][1][1:6], 1e-6, 1e-7)


def _embedding_model(weighting, dense, seed=0):
    """Ids that repeat; `dense` reads the same table by a product with one-hot rows."""
    inputs = keras.Input((3,), dtype="int32")
    initializer = keras.initializers.RandomNormal(seed=seed)
    if dense:
        rows = keras.ops.one_hot(inputs, 7)
        table = keras.layers.Dense(
            2, use_bias=False, kernel_initializer=initializer, name="table"
        )(rows)
    else:
        table = keras.layers.Embedding(7, 2, initializer, name="table")(inputs)
    hidden = keras.layers.Flatten()(table)
    outputs = {
        t.name: t.tower(
            (), kernel_initializer=keras.initializers.GlorotUniform(seed=3 + i)
        )(hidden)
        for i, t in enumerate(_tasks())
    }
    model = MultiTaskModel(inputs, outputs, weighting, tasks=_tasks())
    model.compile(keras.optimizers.SGD(0.5), run_eagerly=EAGER)
    return model


@not_on_jax
@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_sparse_gradients_are_dense_ones(name):
    ids = np.array([[0, 1, 1], [2, 2, 2], [1, 0, 5], [5, 5, 0]], "int32")
    a = np.array([1.0, -1.0, 2.0, 0.5])
    found = []
    for dense in (False, True):
        model = _embedding_model(name, dense)
        model.get_layer("table").set_weights(
            [np.random.default_rng(0).normal(size=(7, 2))]
        )
        before = model.get_layer("table").get_weights()[0]
        model.fit(ids, {"a": a, "b": -a + 0.2}, epochs=2, verbose=0, shuffle=False)
        found.append(model.get_weights()[:5])
    assert_near(found[0], found[1], 1e-4, 1e-5)
    moved = np.abs(found[0][0] - before).sum(axis=1)
    assert (moved[[3, 4, 6]] == 0).all()
    assert (moved[[0, 1, 2, 5]] > 0).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others compile all or none")
def test_xla_has_dense_gradients_of_embeddings():
    """A data-dependent number of rows has no operation there."""
    ids = np.array([[0, 1, 1], [2, 2, 2], [1, 0, 5], [5, 5, 0]], "int32")
    a, found = np.array([1.0, -1.0, 2.0, 0.5]), []
    for eager in (True, False):
        model = _embedding_model("pcgrad", dense=False)
        model.compile(
            keras.optimizers.SGD(0.5), run_eagerly=eager, jit_compile=not eager
        )
        model.fit(ids, {"a": a, "b": -a + 0.2}, epochs=2, verbose=0, shuffle=False)
        found.append(model.get_weights()[:5])
    assert_near(found[1], found[0], 1e-5, 1e-6)


@not_on_jax
def test_loss_scaling_keeps_the_direction():
    """Gradients are scaled by 2^15 before, and the Gramian sees them unscaled."""
    y, found = _labels(True), []
    for optimizer in (
        keras.optimizers.SGD(0.1),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    ):
        model = model_of(_tasks(), "pcgrad", optimizer)
        _same_towers(model)
        found.append(_after(model, weights_of(model), y, epochs=2))
    assert_near(found[1], found[0], 1e-5, 1e-6)


@not_on_jax
@pytest.mark.parametrize("name", ["pcgrad", "nash_mtl", "upgrad"])
def test_a_step_that_overflows_is_skipped(name):
    """No weight and no state is NaN, and the scale is smaller after it."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=1e38
    )
    model = model_of(_tasks(), name, optimizer)
    start = weights_of(model)
    y = {key: 1e6 * label for key, label in _labels(True).items()}
    model.fit(X, y, verbose=0)
    count = len(model.trainable_variables)
    for a, b in zip(weights_of(model)[:count], start[:count], strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(w).all() for w in weights_of(model))
    assert float(optimizer.dynamic_scale) < 1e38


@not_on_jax
@pytest.mark.parametrize("missing", ["a", "both"])
@pytest.mark.parametrize("name", ["nash_mtl", "cagrad"])
def test_a_gradient_of_nan_changes_no_state(name, missing):
    """With loss scaling the step is skipped, so the state must stay, too."""
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    model = model_of(_tasks(), name, optimizer)
    start = weights_of(model)
    y = {key: label.copy() for key, label in _labels(True).items()}
    for key in ("a", "b") if missing == "both" else ("a",):
        y[key][3] = np.nan
    # Arrays would be refused.
    y = {key: keras.ops.convert_to_tensor(label) for key, label in y.items()}
    model.train_on_batch(X, y)
    for found, wanted in zip(weights_of(model), start, strict=True):
        np.testing.assert_array_equal(found, wanted)


@not_on_jax
def test_gradient_accumulation():
    """Two batches of one step: the mean of the two combined gradients."""
    y, found = _labels(False), []
    for steps, batch in ((None, 10), (2, 5)):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        model = model_of(_tasks(), "pcgrad", optimizer)
        _same_towers(model)
        found.append(_after(model, weights_of(model), y, batch_size=batch))
    assert_near(found[1], found[0], 1e-5, 1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others compile all or none")
@pytest.mark.parametrize("name", ["pcgrad", "upgrad"])
def test_compiled_steps_are_the_eager_step(name):
    """With a seed, the orders are the same; embeddings have dense gradients in XLA."""
    y, found = _labels(True), []
    for eager, jit_compile in ((True, False), (False, False), (False, True)):
        weighting = gradients.PCGrad(seed=1) if name == "pcgrad" else name
        model = model_of(_tasks(defined="seen"), weighting)
        model.compile("sgd", run_eagerly=eager, jit_compile=jit_compile)
        y["seen"] = (np.arange(10) < 5).astype("float32")
        found.append(_after(model, weights_of(model), y, epochs=2, batch_size=5))
    for others in found[1:]:
        assert_near(others, found[0], 1e-4, 1e-5)


@keras.saving.register_keras_serializable("tests")
class Difference(JointLoss):
    """The mean squared difference of two outputs."""

    def call(self, rows, outputs):
        return keras.ops.mean(keras.ops.square(outputs["a"] - outputs["b"]))


def test_a_joint_loss_has_a_gradient_of_its_own():
    """It reaches both towers, which are then shared variables."""
    tasks = [Task("a", "regression"), Task("b", "regression", loss=Difference())]
    y, found = _labels(True), []
    for weighting in (None, "pcgrad"):
        model = model_of(tasks, weighting)
        found.append(_after(model, weights_of(model), y))
        measured = model.evaluate(X, y, verbose=0, return_dict=True)
        outputs = model.predict(X, verbose=0)
        wanted = np.mean((outputs["a"] - outputs["b"]) ** 2)
        np.testing.assert_allclose(measured["b_loss"], wanted, rtol=1e-5)
    assert all(np.isfinite(w).all() for w in found[1])
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(tasks[1])
    )
    assert isinstance(again.loss, Difference)


@not_on_jax
@pytest.mark.parametrize("weighting", ["famo", "pcgrad"])
def test_moving_statistics_move_once(weighting):
    """FAMO's second call leaves the statistics of a batch normalization alone."""
    found = []
    for kind in (None, weighting):
        inputs = keras.Input((4,))
        hidden = keras.layers.BatchNormalization(momentum=0.5)(inputs)
        outputs = {task.name: task.tower(())(hidden) for task in _tasks()}
        model = MultiTaskModel(inputs, outputs, kind, tasks=_tasks())
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGER)
        model.fit(X, _labels(True), verbose=0)
        layer = next(x for x in model.layers if "normalization" in x.name)
        found.append([np.array(v) for v in layer.non_trainable_weights])
    assert_near(found[1], found[0], 1e-6, 1e-7)
    np.testing.assert_allclose(found[1][0], 0.5 * X.mean(axis=0), rtol=1e-5)


def test_metrics_and_losses_are_those_before_the_step():
    """As in the step of Keras."""
    y, found = _labels(True), []
    for weighting in (None, "pcgrad", "famo"):
        tasks = [
            Task("a", "regression", metrics=["mae"]),
            Task("b", "regression"),
        ]
        model = model_of(tasks, weighting, keras.optimizers.SGD(0.0))
        history = model.fit(X, y, verbose=0, shuffle=False).history
        found.append([history[key][0] for key in ("a_loss", "b_loss", "a_mae")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)
