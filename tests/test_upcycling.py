import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from keras_moe.upcycling import moe_from_dense, upcycle

X = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")


@pytest.fixture(scope="module")
def dense():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    stem = keras.layers.Dense(6, activation="tanh", name="stem")(inputs)
    hidden = keras.layers.Dense(16, activation="relu", name="up")(stem)
    body = keras.layers.Dense(6, activation="tanh", name="down")(hidden)
    outputs = keras.layers.Dense(1, name="head")(
        keras.layers.LayerNormalization()(body + stem)
    )
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    model.fit(X, X[:, :1], epochs=2, verbose=0)
    return model


def test_the_same_outputs_at_step_0_and_then_experts_part(dense):
    sparse = upcycle(dense, ["up", "down"], num_experts=4)
    np.testing.assert_allclose(
        sparse.predict(X, verbose=0), dense.predict(X, verbose=0), rtol=1e-5, atol=1e-6
    )
    moe = sparse.get_layer("up")
    assert isinstance(moe, MoE)
    kernel = ops.convert_to_numpy(moe.experts.kernels[0])
    assert (kernel == kernel[:1]).all()
    sparse.compile("adam", "mse")
    sparse.fit(X, X[:, :1], epochs=2, verbose=0)
    kernel = ops.convert_to_numpy(moe.experts.kernels[0])
    assert not np.allclose(kernel[0], kernel[1])


def test_the_dense_model_stays_as_it_is(dense):
    before = dense.get_weights()
    sparse = upcycle(dense, [dense.get_layer("up"), "down"], 4, top_k=3)
    sparse.compile("sgd", "mse")
    sparse.fit(X, X[:, :1], verbose=0)
    for a, b in zip(before, dense.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sequential_model_and_a_file(tmp_path):
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)]
    )
    sparse = upcycle(model, model.layers, num_experts=4)
    sparse.save(tmp_path / "sparse.keras")
    again = keras.models.load_model(tmp_path / "sparse.keras")
    for found in (sparse, again):
        np.testing.assert_allclose(
            found.predict(X, verbose=0), model.predict(X, verbose=0), atol=1e-6
        )


def test_one_layer_without_bias():
    layer = keras.layers.Dense(3, use_bias=False)
    expected = ops.convert_to_numpy(layer(X))
    moe = moe_from_dense([layer], num_experts=4, top_k=2)
    np.testing.assert_allclose(ops.convert_to_numpy(moe(X)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["up", "nobody"]}, r"'stem'.*Received: 'nobody'"),
        ({"layers": ["stem", "up"]}, "feed only.*'stem', which feeds"),
        ({"layers": ["down", "up"]}, "feed only the next one"),
        ({"layers": []}, "`layers` must be one or more Dense"),
        ({"layers": "up"}, "`layers` must be a sequence.*'up'"),
        ({"layers": ["up", "down"], "name": "moe"}, "`name` must not be given.*'moe'"),
        ({"layers": ["up", "down"], "top_k": 1}, "`top_k` must be >= 2"),
        (
            {"layers": ["up", "down"], "expert_units": 8},
            "`expert_units` must not be given",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_named(dense, arguments, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense, **{"num_experts": 4, **arguments})


def test_what_layers_adapted_to_is_kept():
    """Statistics and vocabularies are no weights, or are remembered beside them."""
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("strings are TensorFlow's")
    names = np.array([["a"], ["b"], ["a"], ["c"]])
    numbers = np.random.default_rng(0).normal(30.0, 7.0, size=(4, 2)).astype("float32")
    lookup = keras.layers.StringLookup(output_mode="one_hot")
    lookup.adapt(names)
    scale = keras.layers.Normalization()
    scale.adapt(numbers)
    word, value = keras.Input((1,), dtype="string"), keras.Input((2,))
    # One of them inside a model of its own.
    scaled = keras.Model(value, scale(value), name="scaled")
    features = keras.layers.Concatenate()([lookup(word), scaled(value)])
    outputs = keras.layers.Dense(3, name="down")(features)
    model = keras.Model([word, value], outputs)
    sparse = upcycle(model, ["down"], num_experts=4)
    inputs = [tf.constant(names), tf.constant(numbers)]
    np.testing.assert_allclose(sparse(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_a_layer_that_others_use_too_is_refused():
    """Its output would be that of the mixture, or of nothing, elsewhere."""
    inputs = keras.Input((5,))
    up = keras.layers.Dense(5, "relu", name="up")
    down = keras.layers.Dense(5, name="down")
    hidden = up(inputs)
    seen = keras.Model(inputs, [hidden, down(hidden)])
    with pytest.raises(
        ValueError, match="'up', whose output is an output of the model"
    ):
        upcycle(seen, ["up", "down"], num_experts=4)
    twice = keras.Model(inputs, down(hidden) + down(inputs))
    with pytest.raises(ValueError, match="'down', which is called"):
        upcycle(twice, ["up", "down"], num_experts=4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"router": "expert_choice"},
        {"router": TopKRouter(4, 1)},
        {"router": TopKRouter(4, 2, renormalize=False)},
        {"capacity_factor": 0.5},
    ],
    ids=["expert_choice", "switch", "not_renormalized", "capacity"],
)
def test_what_would_change_the_outputs_is_refused(dense, arguments):
    with pytest.raises(ValueError, match="weights sum to 1"):
        upcycle(dense, ["up", "down"], 4, **arguments)


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.up = keras.layers.Dense(4, name="up")

    def call(self, inputs):
        return self.up(inputs)


@pytest.mark.parametrize(
    "model",
    [None, keras.Sequential([keras.layers.Dense(4, name="up")]), _Subclassed()],
    ids=["None", "unbuilt", "subclassed"],
)
def test_models_of_unknown_layers_are_named(model):
    if model is not None and not isinstance(model, keras.Sequential):
        model(np.ones((2, 3)))
    with pytest.raises(ValueError, match="`model` must be a built functional or Seq"):
        upcycle(model, ["up"], num_experts=4)


def test_two_hidden_activations_are_refused():
    layers = [keras.layers.Dense(4, name) for name in ("relu", "tanh", "relu")]
    for layer in layers:
        layer.build((None, 4))
    with pytest.raises(ValueError, match=r"one activation.*'relu', 'tanh'"):
        moe_from_dense(layers, num_experts=2)
