"""The optimizers in `fit`, in files, in other optimizers, and what a step costs."""

import keras
import numpy as np
import pytest

from keras_moe import optimizers
from keras_moe.layers import MMoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.support import optimizer_steps as steps

KINDS = {
    "FusedAdam": lambda: optimizers.FusedAdam(0.01, weight_decay=0.01),
    "FusedAdagrad": lambda: optimizers.FusedAdagrad(0.1),
    "LazyAdam": lambda: optimizers.LazyAdam(0.01),
    "RowwiseAdagrad": lambda: optimizers.RowwiseAdagrad(0.01),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# "auto" is what fit compiles with on JAX and does not on torch.
COMPILED = [False, True] if keras.backend.backend() == "tensorflow" else ["auto"]


def data():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 30, (64, 3)).astype("int32")
    x[:, 1] = x[:, 0]
    return x, rng.normal(size=(64, 1)).astype("float32")


def model(optimizer, jit_compile="auto"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,), dtype="int32")
    table = keras.layers.Embedding(40, 4, name="table")
    hidden = keras.layers.Flatten()(table(inputs))
    hidden = keras.layers.Dense(8, "relu")(hidden)
    built = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    built.compile(optimizer, "mse", jit_compile=jit_compile)
    return built


def fit(built, epochs=3):
    x, y = data()
    history = built.fit(
        x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0
    ).history
    return history["loss"]


def state(built):
    variables = [*built.trainable_variables, *built.optimizer.variables]
    return [steps.array(variable) for variable in variables]


@every_kind
def test_fit_with_every_compiler_gives_the_same(kind):
    found = []
    for jit_compile in COMPILED:
        built = model(KINDS[kind](), jit_compile)
        losses = fit(built)
        assert losses[-1] < losses[0]
        found.append(state(built))
    for a, b in zip(found[0], found[-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LazyAdam", "RowwiseAdagrad"])
def test_rows_that_no_batch_has_keep_their_values(kind):
    built = model(KINDS[kind]())
    before = built.get_layer("table").get_weights()[0]
    fit(built)
    after = built.get_layer("table").get_weights()[0]
    unseen = ~np.isin(np.arange(40), data()[0])
    assert unseen.sum() >= 10
    np.testing.assert_array_equal(after[unseen], before[unseen])
    assert (after[~unseen] != before[~unseen]).any(axis=1).all()


@every_kind
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(kind, policy):
    """Keras wraps the optimizer into a LossScaleOptimizer for float16."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        built = model(KINDS[kind]())
    finally:
        keras.config.set_dtype_policy(before)
    scaled = isinstance(built.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    losses = fit(built, 4)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert {v.dtype for v in built.trainable_variables} == {"float32"}


@every_kind
def test_training_goes_on_from_a_file(kind, tmp_path):
    whole = model(KINDS[kind]())
    fit(whole, 4)
    half = model(KINDS[kind]())
    fit(half, 2)
    half.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    assert type(loaded.optimizer) is type(half.optimizer)
    assert loaded.optimizer.get_config() == half.optimizer.get_config()
    fit(loaded, 2)
    for a, b in zip(state(loaded), state(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@every_kind
def test_weights_files_have_the_slots(kind, tmp_path):
    first, second = model(KINDS[kind]()), model(KINDS[kind]())
    fit(first)
    second.optimizer.build(second.trainable_variables)
    first.save_weights(tmp_path / "model.weights.h5")
    second.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(state(first), state(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["FusedAdam", "FusedAdagrad", "LazyAdam"])
def test_slots_of_keras_can_be_loaded(kind, tmp_path):
    """`FusedAdagrad` keeps its epsilon, 1e-7, in the slot."""
    of_keras = "Adagrad" if kind == "FusedAdagrad" else "Adam"
    first = model(getattr(keras.optimizers, of_keras)(0.01))
    fit(first)
    first.save_weights(tmp_path / "model.weights.h5")
    second = model(getattr(optimizers, kind)(0.5))
    second.optimizer.build(second.trainable_variables)
    second.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(state(first), state(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_table_for_two_features():
    """The gradients of both look-ups come as one."""
    found = []
    for kind in (optimizers.LazyAdam, optimizers.FusedAdam):
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((2,), dtype="int32") for _ in range(2)]
        table = keras.layers.Embedding(4, 3)
        both = keras.layers.Concatenate(axis=1)([table(x) for x in inputs])
        built = keras.Model(inputs, keras.layers.Flatten()(both))
        built.compile(kind(0.01), "mse")
        # Every id is in every batch, so that both are Adam.
        x = np.array([[0, 1], [2, 3]] * 4, "int32")
        y = np.random.default_rng(0).normal(size=(8, 12)).astype("float32")
        built.fit([x, x[::-1]], y, batch_size=4, epochs=3, shuffle=False, verbose=0)
        found.append(built.get_weights()[0])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("weighting", [None, "gradnorm", "upgrad"])
def test_several_tasks(kind, weighting):
    x, y = data()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Flatten()(keras.layers.Embedding(40, 4)(inputs))
    shared = MMoE(2, (4,), ["a", "b"])(hidden)
    outputs = {task: Tower(())(shared[task]) for task in ("a", "b")}
    built = MultiTaskModel(inputs, outputs, weighting)
    built.compile(KINDS[kind](), "mse")
    history = built.fit(x, {"a": y, "b": -y}, epochs=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["a_loss"][-1] < history["a_loss"][0]


def _step(optimizer, rows, columns=16, batch=64, layer=keras.layers.Embedding):
    """A training step of a table and a dense layer, as a tf.function."""
    import tensorflow as tf

    table = layer(rows, columns, "zeros")
    built = keras.Sequential(
        [keras.Input((), dtype="int32"), table, keras.layers.Dense(1)]
    )
    optimizer.build(built.trainable_variables)
    weights = [weight.value for weight in built.trainable_variables]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((built(x) - 1) ** 2)
        optimizer.apply(tape.gradient(loss, weights), built.trainable_variables)
        return loss

    x = np.random.default_rng(0).integers(0, rows, batch).astype("int32")
    return step, tf.constant(x)


@steps.on_tensorflow
@pytest.mark.parametrize("kind", ["LazyAdam", "RowwiseAdagrad", "FusedAdagrad"])
def test_no_operation_of_a_step_makes_a_second_table(kind):
    """`ReadVariableOp` shares the memory of the table, see the test below."""
    step, x = _step(KINDS[kind](), 5000)
    graph = step.get_concrete_function(x).graph
    large = {
        op.type
        for op in graph.get_operations()
        if any(5000 in (output.shape.as_list() or []) for output in op.outputs)
    }
    assert large <= {"ReadVariableOp"}
    read, gathered = (
        {op.inputs[0].name for op in graph.get_operations() if op.type == kind}
        for kind in ("ReadVariableOp", "ResourceGather")
    )
    assert not read & gathered  # Such a read would be a copy.


class _GatheringEmbedding(keras.layers.Embedding):
    """Gathers rows without a read of the table, as `tf.nn.embedding_lookup` does."""

    def call(self, inputs):
        import tensorflow as tf

        return tf.nn.embedding_lookup(self._embeddings.value, inputs)


@steps.on_tensorflow
@pytest.mark.parametrize("layer", [keras.layers.Embedding, _GatheringEmbedding])
@pytest.mark.parametrize("kind", ["LazyAdam", "RowwiseAdagrad", "FusedAdagrad"])
def test_a_step_allocates_no_second_table(kind, layer):
    """A scatter lets TensorFlow copy the table in each read that follows."""
    rows, columns = 1_000_000, 16
    step, x = _step(KINDS[kind](), rows, columns, layer=layer)
    step(x)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Starts the peak anew.
        before = _status("VmRSS")
    except OSError:
        pytest.skip("Linux alone accounts for this")
    for _ in range(3):
        step(x)
    grown = _status("VmHWM") - before
    assert grown < rows * columns * 4 / 4, f"{grown / 2**20} MiB"


def _status(name):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024
