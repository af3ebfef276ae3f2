"""FiniteGuard: a batch that is not finite changes nothing, and is named."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.callbacks import ExactBackup, FiniteGuard
from keras_moe.layers import MMoE, MoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.support.checks import not_on_jax

BACKEND = keras.backend.backend()
BATCH = 8
X = np.random.default_rng(0).normal(size=(4 * BATCH, 4)).astype("float32")
COMPILED = [False, True] if BACKEND == "tensorflow" else [BACKEND == "jax"]


def _model(router="bias_balanced", jit_compile=False, **compiled):
    keras.utils.set_random_seed(0)
    price, age = keras.Input((2,), name="price"), keras.Input((2,), name="age")
    hidden = keras.layers.Concatenate()([price, age])
    # A bias would have rounding errors alone as its gradient, which Adam enlarges.
    hidden = keras.layers.Dense(4, use_bias=False)(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.ReLU()(MoE(3, (5, 4), router=router)(hidden))
    model = keras.Model({"price": price, "age": age}, keras.layers.Dense(1)(hidden))
    compiled = {"optimizer": "adam", "loss": "mse", "metrics": ["mae"], **compiled}
    model.compile(**compiled, jit_compile=jit_compile)
    return model


def _fit(model, guard, x=X, y=None, **kwargs):
    features = {"price": x[:, :2], "age": x[:, 2:]}
    y = X[:, :1] if y is None else y
    return model.fit(
        features,
        y,
        batch_size=BATCH,
        shuffle=False,
        callbacks=guard if isinstance(guard, list) else [guard],
        verbose=0,
        **kwargs,
    )


def _values(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def _is_finite(model):
    """Of weights alone: a router marks a step that it has not seen with NaN."""
    weights = [ops.convert_to_numpy(weight) for weight in model.weights]
    slots = [ops.convert_to_numpy(slot) for slot in model.optimizer.variables]
    return all(np.isfinite(value).all() for value in weights + slots)


def _with_infinity(batch, row):
    x = X.copy()
    x[batch * BATCH + row, 2] = np.inf
    return x


@pytest.mark.parametrize(
    "router",
    [
        "bias_balanced",
        *(
            pytest.param(router, marks=not_on_jax)
            for router in ("top_k", "expert_choice", "sinkhorn", "dense")
        ),
    ],
)
def test_the_feature_and_its_row_are_named(router):
    model = _model(router)
    with pytest.raises(
        FloatingPointError,
        match=r"epoch 1, batch 1: feature 'age' is not finite in row 3 of the batch\. "
        r"The batch was not applied",
    ):
        _fit(model, FiniteGuard(), _with_infinity(0, 3))
    assert _is_finite(model)
    # The model is as it was made, and trains again.
    for found, fresh in zip(model.weights, _model(router).weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(found), ops.convert_to_numpy(fresh)
        )
    assert "train_step" not in vars(model)
    _fit(model, FiniteGuard())


@pytest.mark.parametrize("jit_compile", COMPILED)
def test_a_skipped_batch_changes_nothing(jit_compile):
    """The same weights, averages, metrics and optimizer as without the batch."""
    model = _model(jit_compile=jit_compile)
    with pytest.warns(UserWarning, match=r"batch 3: feature 'age'.*is skipped"):
        history = _fit(model, FiniteGuard("skip"), _with_infinity(2, 0)).history
    without = np.delete(X, slice(2 * BATCH, 3 * BATCH), axis=0)
    reference = _model(jit_compile=jit_compile)
    guarded = FiniteGuard("skip")
    expected = _fit(reference, guarded, without, without[:, :1]).history
    for found, value in zip(_values(model), _values(reference), strict=True):
        np.testing.assert_array_equal(found, value)
    assert history.pop("skipped_batches") == [1]
    assert expected.pop("skipped_batches") == [0]
    assert history == expected


@pytest.mark.parametrize("jit_compile", COMPILED)
def test_an_unguarded_training_is_the_same(jit_compile):
    model, plain = _model(jit_compile=jit_compile), _model(jit_compile=jit_compile)
    _fit(model, FiniteGuard(), epochs=2)
    _fit(plain, keras.callbacks.Callback(), epochs=2)
    for found, value in zip(_values(model), _values(plain), strict=True):
        if jit_compile:  # XLA fuses other operations.
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, value)


def test_a_gradient_is_named_with_its_expert():
    class Overflows(keras.layers.Layer):
        """Its gradient is infinite where its output is finite."""

        def build(self, shape):
            self.kernel = self.add_weight(
                shape=(3, 4, 4), initializer="ones", name="expert_kernel"
            )

        def call(self, x):
            root = ops.sqrt(ops.abs(self.kernel[1] * 0.0))
            return x + ops.sum(root)

    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(Overflows()(inputs)))
    model.compile("sgd", "mse")
    with pytest.raises(
        FloatingPointError, match=r"gradient of overflows.*, expert 1, is not finite"
    ):
        model.fit(X, X[:, :1], callbacks=[FiniteGuard()], verbose=0)


def test_a_weight_is_named():
    model = _model()
    kernel = next(v for v in model.weights if len(v.shape) == 3)
    value = np.array(ops.convert_to_numpy(kernel))
    value[2, 0, 0] = np.nan
    kernel.assign(value)
    with pytest.raises(FloatingPointError, match=r"the weight \S+, expert 2, is not"):
        _fit(model, FiniteGuard())


def test_a_learning_rate_that_diverges_is_noticed():
    model = _model(optimizer=keras.optimizers.SGD(1e30))
    with pytest.raises(FloatingPointError, match="is not finite"):
        _fit(model, FiniteGuard(), epochs=9)


def test_the_row_of_a_table_is_named():
    inputs = keras.Input((1,), dtype="int32")
    table = keras.layers.Embedding(9, 2, embeddings_initializer="zeros")
    hidden = keras.layers.Flatten()(table(inputs))
    roots = keras.layers.Lambda(lambda t: ops.sqrt(ops.abs(t)))(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1)(roots))
    model.compile("sgd", "mse")
    table.embeddings.assign(np.where(np.arange(9)[:, None] == 7, 0.0, np.ones((9, 2))))
    ids = np.array([[1], [7], [3]])
    with pytest.raises(FloatingPointError, match=r"embeddings, row 7, is not finite"):
        model.fit(ids, ids, callbacks=[FiniteGuard()], verbose=0)


def test_large_values_pass():
    """Their squares overflow, they do not."""
    inputs = keras.Input((4,))
    model = keras.Sequential([inputs, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-20), "mae")
    x = X * 1e25
    history = model.fit(x, X[:, :1], callbacks=[FiniteGuard("skip")], verbose=0)
    assert history.history["skipped_batches"] == [0]


def test_an_interrupted_fit_can_be_followed_by_others():
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise InterruptedError

    model = _model()
    with pytest.raises(InterruptedError):
        _fit(model, [FiniteGuard(), Interrupt()])
    _fit(model, FiniteGuard())
    with pytest.raises(InterruptedError):
        _fit(model, [FiniteGuard(), Interrupt()])
    model.compile("sgd", "mse")
    _fit(model, keras.callbacks.Callback())  # with an optimizer that has no guard
    guard = FiniteGuard()
    model.evaluate(
        {"price": X[:, :2], "age": X[:, 2:]}, X[:, :1], callbacks=[guard], verbose=0
    )
    assert "train_step" not in vars(model)


def test_an_exact_backup_has_its_counts(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise InterruptedError

    def fit(folder, *more):
        guard = FiniteGuard("skip")
        backup = ExactBackup(folder, callbacks=[guard])
        callbacks = [backup, guard, *more]
        return _fit(_model(), callbacks, _with_infinity(1, 0), epochs=3).history

    with pytest.warns(UserWarning, match="is skipped"):
        whole = fit(tmp_path / "whole")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(InterruptedError),
    ):
        fit(tmp_path / "backup", Interrupt())
    with pytest.warns(UserWarning, match="is skipped"):
        assert fit(tmp_path / "backup") == whole
    assert whole["skipped_batches"] == [1, 1, 1]


def test_too_many_in_a_row():
    x = np.full_like(X, np.nan)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(FloatingPointError, match="3 batches in a row were skipped"),
    ):
        _fit(_model(), FiniteGuard("skip", max_in_a_row=3), x)


@pytest.mark.parametrize("loss_weighting", [None, "pcgrad", "uncertainty"])
def test_several_tasks(loss_weighting):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="features")
    shared = MMoE(2, 3, ["a", "b"])(inputs)
    outputs = {task: Tower(())(shared[task]) for task in shared}
    model = MultiTaskModel(inputs, outputs, loss_weighting=loss_weighting)
    model.compile("adam", {"a": "mse", "b": "mse"})
    labels = {"a": X[:, :1], "b": X[:, 1:2]}
    x = _with_infinity(1, 5)
    with pytest.raises(FloatingPointError, match=r"batch 2: feature .* row 5"):
        model.fit(
            x,
            labels,
            batch_size=BATCH,
            shuffle=False,
            callbacks=[FiniteGuard()],
            verbose=0,
        )
    assert _is_finite(model)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a strategy of TensorFlow")
def test_a_strategy_is_refused():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = _model()
    with pytest.raises(ValueError, match="Received: MirroredStrategy"):
        _fit(model, FiniteGuard())


@pytest.mark.parametrize(
    "arguments", [{"action": "warn"}, {"max_in_a_row": 0}, {"max_in_a_row": "x"}]
)
def test_bad_arguments_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`"):
        FiniteGuard(**arguments)
