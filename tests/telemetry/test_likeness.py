"""Similarities of experts, silent units and conflicts, against NumPy."""

import keras
import numpy as np
import pytest

from keras_moe import experts, layers, multitask, telemetry
from keras_moe.telemetry._conflict import GradientConflict

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")


def built(stacked):
    stacked(X)
    return stacked


def test_copies_are_alike():
    mlp = built(experts.MLPExperts(3, (8, 4)))
    for weight in mlp.weights:
        value = np.array(keras.ops.convert_to_numpy(weight))
        value[2] = value[0]
        weight.assign(value)
    for found in (
        telemetry.output_similarity(mlp, X),
        telemetry.kernel_similarity(mlp),
    ):
        np.testing.assert_allclose(found[0, 2], 1.0, atol=1e-5)
        np.testing.assert_allclose(np.diag(found), 1.0, atol=1e-5)
        np.testing.assert_allclose(found, found.T, atol=1e-12)
        assert abs(found[0, 1]) < 0.6


def test_similarity_by_numpy():
    mlp = built(experts.MLPExperts(3, (8, 4), activation="tanh"))
    outputs = keras.ops.convert_to_numpy(mlp(X)).astype("float64")
    flat = [(outputs[:, k] - outputs[:, k].mean(0)).ravel() for k in range(3)]
    expected = np.corrcoef(flat)  # Each has a mean of zero already.
    np.testing.assert_allclose(telemetry.output_similarity(mlp, X), expected, atol=1e-6)


def test_layers_of_any_kind():
    alike = built(experts.LayerExperts([keras.layers.Dense(4) for _ in range(3)]))
    assert telemetry.kernel_similarity(alike).shape == (3, 3)
    assert telemetry.zero_activations(alike, X) is None
    small = keras.layers.Dense(4)
    large = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(4)])
    assert (
        telemetry.kernel_similarity(built(experts.LayerExperts([small, large]))) is None
    )


def test_silent_units():
    mlp = built(experts.MLPExperts(3, (8, 4)))
    bias = np.zeros((3, 8), "float32")
    bias[1] = -1000.0
    mlp.biases[0].assign(bias)
    found = telemetry.zero_activations(mlp, keras.ops.convert_to_tensor(X))
    kernel = keras.ops.convert_to_numpy(mlp.kernels[0])
    hidden = np.maximum(np.einsum("nd,edh->enh", X, kernel) + bias[:, None], 0)
    np.testing.assert_allclose(found, (hidden == 0).mean(axis=(1, 2)), atol=1e-6)
    assert found[1] == 1.0
    glu = built(experts.GLUExperts(3, 8, activation="relu"))
    found = telemetry.zero_activations(glu, keras.ops.convert_to_tensor(X))
    assert (abs(found - 0.5) < 0.2).all()
    assert telemetry.zero_activations(built(experts.MLPExperts(3, (4,))), X) is None


def two_tasks(kernel):
    """Both tasks read one unit, h = x . kernel; each has one weight of its own."""
    inputs = keras.Input((2,))
    hidden = keras.layers.Dense(1, use_bias=False, name="shared")(inputs)
    outputs = {
        task: keras.layers.Dense(1, use_bias=False, name=f"{task}_head")(hidden)
        for task in ("a", "b")
    }
    model = multitask.MultiTaskModel(inputs, outputs)
    model.get_layer("shared").kernel.assign(kernel)
    return model


@pytest.mark.parametrize(("sign", "cosine"), [(1.0, 1.0), (-1.0, -1.0)])
def test_conflict_by_hand(sign, cosine):
    """Both heads are 1; the residuals h - y are 1 for a and `sign` for b.

    The gradient of (h - y)^2 by h is 2 (h - y): both are equal or opposite.
    """
    model = two_tasks(np.array([[1.0], [0.5]], "float32"))
    for task in ("a", "b"):
        model.get_layer(f"{task}_head").kernel.assign(np.ones((1, 1), "float32"))
    model.compile("sgd", "mse")
    x = np.array([[1.0, 0.0], [0.0, 1.0]], "float32")
    h = np.array([[1.0], [0.5]], "float32")
    y = {"a": h - 1.0, "b": h - sign}  # residuals 1 and `sign`
    found = telemetry.gradient_conflict(model, x, y)
    np.testing.assert_allclose(found, [[1.0, cosine], [cosine, 1.0]], atol=1e-6)


def test_conflict_by_numpy():
    model = two_tasks(np.array([[1.0], [0.5]], "float32"))
    w = {"a": 0.7, "b": -1.3}
    for task, value in w.items():
        model.get_layer(f"{task}_head").kernel.assign(np.full((1, 1), value, "float32"))
    model.compile("sgd", "mse", loss_weights={"a": 1.0, "b": 5.0})
    x = np.random.default_rng(1).normal(size=(16, 2)).astype("float32")
    y = {"a": x[:, :1], "b": np.where(x[:, 1:] > 0, x[:, 1:], np.nan)}
    known = {"b": (x[:, 1] > 0).astype("float32")}
    found = telemetry.gradient_conflict(model, x, y, known)
    h = x @ np.array([[1.0], [0.5]])
    gradients = []
    for task in ("a", "b"):
        residual = np.where(np.isnan(y[task]), 0.0, w[task] * h - y[task])
        gradients.append((2 * residual * w[task] * x).sum(axis=0))
    (a, b) = gradients
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found[0, 1], cosine, atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "all but the table is frozen"])
@pytest.mark.parametrize("weighted", [False, True])
def test_conflict_after_a_change(change, weighted):
    """Compiled or not; with a table, of whose gradients TensorFlow has some rows."""
    ids = keras.Input((3,), dtype="int32")
    table = keras.layers.Embedding(7, 4)
    shared = keras.layers.Dense(5, name="shared")(keras.layers.Flatten()(table(ids)))
    outputs = {task: keras.layers.Dense(1)(shared) for task in ("a", "b")}
    model = multitask.MultiTaskModel(ids, outputs)
    x = np.random.default_rng(0).integers(0, 7, (8, 3))
    y = {"a": X[:8, :1], "b": X[:8, 1:2]}
    sample_weight = np.arange(8.0) if weighted else None
    weights, found = model.get_weights(), []
    for run_eagerly in (True, False):
        # JAX compiles its training steps in any case.
        model.compile("sgd", "mse", run_eagerly=run_eagerly and BACKEND != "jax")
        model.set_weights(weights)
        conflict = GradientConflict(model)
        found.append([conflict(x, y, sample_weight)])
        if change == "weights":
            model.set_weights([w + 0.1 for w in weights])
        else:
            for layer in model.layers:
                layer.trainable = layer is table
        found[-1].append(conflict(x, y, sample_weight))
        for layer in model.layers:
            layer.trainable = True
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    before, after = (cosines[0, 1] for cosines in found[0])
    assert abs(before) < 0.999
    assert abs(after - before) > 1e-3


def test_conflict_in_mixtures_leaves_out_what_one_task_has():
    inputs = keras.Input((6,))
    shared = layers.MMoE(3, (8, 4), ["a", "b"])(inputs)
    outputs = {task: layers.Tower((4,))(shared[task]) for task in shared}
    model = multitask.MultiTaskModel(inputs, outputs)
    model.compile("adam", "mse")
    y = {"a": X[:, :1], "b": X[:, 1:2]}
    found = telemetry.gradient_conflict(model, X, y)
    assert found.shape == (2, 2)
    assert -1 <= found[0, 1] <= 1
    np.testing.assert_allclose(np.diag(found), 1.0)


def test_rows_that_differ_are_named():
    model = two_tasks(np.ones((2, 1)))
    model.compile("sgd", "mse")
    x, y = X[:8, :2], {"a": X[:8, :1], "b": X[:3, :1]}
    with pytest.raises(ValueError, match=r"`y` must be.*rows \[8, 3\]"):
        telemetry.gradient_conflict(model, x, y)
    with pytest.raises(ValueError, match=r"`y` must be.*as many as `x`: 8.*\[1, 1\]"):
        telemetry.gradient_conflict(model, x, {"a": X[:1, :1], "b": X[:1, :1]})


def test_conflict_names_what_is_wrong():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    with pytest.raises(TypeError, match="`model` must be a MultiTaskModel"):
        telemetry.gradient_conflict(model, X, X)
    with pytest.raises(ValueError, match="must be compiled"):
        telemetry.gradient_conflict(two_tasks(np.ones((2, 1))), X, X)
