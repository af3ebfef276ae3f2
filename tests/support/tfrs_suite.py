"""Keras 3 layers in models of Keras 2. `test_tfrs.py` runs this in its own process.

TensorFlow decides once in a process which Keras `tf.keras` is.
"""

import doctest
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_moe.tfrs
from keras_moe.tfrs import LegacyLayer, tf_keras

# isort: split
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_recommenders as tfrs

from keras_moe.layers import PLE, MMoE, MoE, PPNet, SharedBottom
from tests.support import processes

CPUS = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    CPUS[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


def test_the_docstring_example_runs():
    names = {"keras_moe": keras_moe, "tf": tf, "np": np}
    assert doctest.testmod(keras_moe.tfrs, extraglobs=names) == (0, 4)


def test_importing_it_first_makes_tf_keras_keras_2():
    assert keras.__version__.startswith("3.")
    assert tf.keras.Model is tf_keras.Model


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
    tf_keras.utils.set_random_seed(0)


def rows(n=64, d=3):
    return np.random.default_rng(0).normal(size=(n, d)).astype("float32")


def moe_model(**kwargs):
    """Return a model of Keras 2 and the MoE in the middle of it."""
    body = LegacyLayer(MoE(4, (8, 5), top_k=2, **kwargs))
    model = tf_keras.Sequential([tf_keras.layers.Dense(3), body])
    model.add(tf_keras.layers.Dense(1))
    model.build((None, 3))
    model.compile("adam", "mse")
    return model, body


def test_it_calls_the_layer():
    layer = MMoE(4, (8, 5), ["click", "buy"])
    wrapped, x = LegacyLayer(layer), rows()
    found, expected = wrapped(x), layer(x)
    assert list(found) == ["click", "buy"]
    for task in found:
        np.testing.assert_array_equal(found[task], expected[task])
    assert wrapped.compute_output_shape((None, 3)) == {
        "click": tf.TensorShape([None, 5]),
        "buy": tf.TensorShape([None, 5]),
    }


def test_further_inputs_are_handed_on():
    x, prior = rows(), rows(d=2)
    for args, kwargs in (((x, prior), {}), ((x,), {"prior_inputs": prior})):
        layer = PPNet(4, 2)
        found = LegacyLayer(layer)(*args, **kwargs)
        for a, b in zip(found, layer(x, prior), strict=True):
            np.testing.assert_array_equal(a, b)


def test_its_weights_have_names_and_are_those_of_the_layer():
    layer = MMoE(4, (8, 5), 2)
    wrapped = LegacyLayer(layer)
    assert wrapped.name == layer.name
    assert LegacyLayer(layer, name="body").name == "body"
    assert wrapped.weights == []
    wrapped(rows())
    names = [weight.name for weight in wrapped.weights]
    assert len(set(names)) == len(names) == 5
    for name in ("experts/kernel_0", "experts/bias_1", "gates/kernel_0"):
        assert any(name in found for found in names)
    for weight, variable in zip(wrapped.weights, layer.weights, strict=True):
        assert weight is variable.value


def test_it_learns_by_fit():
    model, body = moe_model()
    before = [weight.numpy() for weight in body.trainable_weights]
    x = rows(256)
    losses = model.fit(x, np.abs(x[:, :1]), epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    for weight, old in zip(body.trainable_weights, before, strict=True):
        assert not np.array_equal(weight, old)


def test_frozen_weights_stay():
    model, body = moe_model()
    total = len(model.trainable_weights)
    model.trainable = False
    assert model.trainable_weights == []
    assert not body.layer.trainable
    assert len(model.non_trainable_weights) == len(model.weights)
    model.trainable = True
    body.layer.experts.trainable = False  # a part of the wrapped layer
    assert len(model.trainable_weights) == total - 4
    assert body.trainable
    model.compile("adam", "mse")
    frozen = [v.numpy() for v in body.layer.experts.variables]
    model.fit(rows(), rows(d=1), verbose=0)
    for variable, old in zip(body.layer.experts.variables, frozen, strict=True):
        np.testing.assert_array_equal(variable.value, old)
    assert not LegacyLayer(MMoE(2, 3, 2, trainable=False)).trainable
    assert not LegacyLayer(MMoE(2, 3, 2), trainable=False).layer.trainable


def test_losses_are_those_of_the_layer_however_often_it_is_called():
    layer = MoE(4, (8, 5), top_k=2, kernel_regularizer="l2")
    wrapped, x = LegacyLayer(layer), rows()
    layer(x)
    # The router's losses of each call, and the weights' regularization once.
    (*routing, first, second) = [float(loss) for loss in layer.losses]
    assert routing
    wrapped(x)
    found = sorted(float(loss) for loss in wrapped.losses)
    assert found == pytest.approx(sorted([*routing, first + second]))

    inputs = tf_keras.Input((3,))
    model = tf_keras.Model(inputs, wrapped(inputs) + wrapped(inputs))
    model(x)
    assert sum(map(float, model.losses)) == pytest.approx(
        2 * sum(routing) + first + second
    )
    model.compile("sgd", "mse")
    zero = model.evaluate(x, model(x).numpy(), verbose=0, batch_size=64)
    assert zero == pytest.approx(2 * sum(routing) + first + second, rel=1e-4)
    wrapped.trainable = False
    assert sum(map(float, wrapped.losses[-1:])) == 0.0


def test_masks_go_in_and_out():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    inputs = tf_keras.Input((4,), dtype="int32")
    vectors = tf_keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
    outputs = LegacyLayer(MoE(4, (8, 5), top_k=2))(vectors)
    mean = tf_keras.layers.GlobalAveragePooling1D()(outputs)
    found, pooled = tf_keras.Model(inputs, [outputs, mean])(tokens)
    assert (found.numpy()[tokens == 0] == 0).all()
    assert (found.numpy()[tokens > 0] != 0).any(axis=-1).all()
    np.testing.assert_allclose(pooled[1], found[1, 0], rtol=1e-6)


def test_training_is_handed_on():
    wrapped, x = LegacyLayer(SharedBottom((64, 8), 1, dropout=0.5)), rows()
    np.testing.assert_array_equal(wrapped(x)[0], wrapped(x, training=False)[0])
    assert not np.allclose(wrapped(x)[0], wrapped(x, training=True)[0])
    assert not np.allclose(wrapped(x, training=True)[0], wrapped(x, training=True)[0])


def test_mixed_precision_is_the_layers():
    wrapped = LegacyLayer(MMoE(4, (8, 5), 1, dtype="mixed_float16"))
    (outputs,) = wrapped(rows())
    assert outputs.dtype == wrapped.compute_dtype == "float16"
    assert {weight.dtype for weight in wrapped.weights} == {tf.float32}
    model = tf_keras.Sequential(
        [LegacyLayer(MoE(4, 5, dtype="mixed_float16")), tf_keras.layers.Dense(1)]
    )
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.Adam())
    model.compile(optimizer, "mse")
    (loss,) = model.fit(rows(), rows(d=1), verbose=0).history["loss"]
    assert np.isfinite(loss)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("file", ["tf", "w.h5", "w.weights.h5", "checkpoint"])
def test_weights_are_saved_and_found_again(file, tmp_path):
    model, _ = moe_model()
    other, _ = moe_model()
    path, x = str(tmp_path / file), rows()
    assert not np.allclose(other(x), model(x))
    if file == "checkpoint":
        saved = tf.train.Checkpoint(model=model).save(path)
        status = tf.train.Checkpoint(model=other).restore(saved)
        status.assert_existing_objects_matched()
    else:
        model.save_weights(path)
        other.load_weights(path)
    np.testing.assert_array_equal(other(x), model(x))


def test_weights_find_their_place_where_others_are_frozen(tmp_path):
    model, _ = moe_model()
    other, body = moe_model()
    body.layer.experts.trainable = False
    model.save_weights(tmp_path / "w.weights.h5")
    other.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(other(rows()), model(rows()))


def test_a_checkpoint_waits_for_a_layer_without_weights(tmp_path):
    wrapped, x = LegacyLayer(MMoE(4, 5, 1)), rows()
    wrapped(x)
    path = tf.train.Checkpoint(body=wrapped).save(str(tmp_path / "checkpoint"))
    later = LegacyLayer(MMoE(4, 5, 1))
    tf.train.Checkpoint(body=later).restore(path)
    np.testing.assert_array_equal(later(x)[0], wrapped(x)[0])


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("file", ["m.keras", "m.h5", "folder"])
def test_models_are_saved_and_loaded(file, tmp_path):
    inputs = tf_keras.Input((3,))
    model = tf_keras.Model(
        inputs, LegacyLayer(PLE(2, 1, 1, (8, 5), ["a", "b"]))(inputs)
    )
    model.save(tmp_path / file)
    again = tf_keras.models.load_model(tmp_path / file)
    for task, expected in model(rows()).items():
        np.testing.assert_array_equal(again(rows())[task], expected)


def test_two_replicas_train_it():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        body = LegacyLayer(MoE(4, (8, 5), top_k=2, dropout=0.1))
        model = tf_keras.Sequential([body, tf_keras.layers.Dense(1)])
        model(rows(4))
        model.compile("adam", "mse")
    x = rows(256)
    losses = model.fit(x, x[:, :1], epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    first, second = body.weights[0].values
    np.testing.assert_array_equal(first, second)


def test_replicas_need_its_weights():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = tf_keras.Sequential([LegacyLayer(MoE(4, 1, name="body"))])
        model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"'body' must exist.*2 replicas.*scope\(\)"):
        model.fit(rows(), rows(d=1), verbose=0)


def test_a_table_is_saved_too(tmp_path):
    inputs = keras.Input((), dtype="string")
    codes = keras.layers.StringLookup(vocabulary=["a", "b"])(inputs)
    module = tf.Module()
    module.body = LegacyLayer(keras.Model(inputs, keras.layers.Embedding(3, 2)(codes)))
    module.score = tf.function(
        lambda words: module.body(words),
        input_signature=[tf.TensorSpec([None], "string")],
    )
    expected = module.score(tf.constant(["a", "z"]))
    tf.saved_model.save(module, str(tmp_path / "model"))
    again = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(again.score(tf.constant(["a", "z"])), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": tf_keras.layers.Dense(2)}, "`layer` must be a Keras 3 layer"),
        ({"layer": "mmoe"}, "`layer` must be a Keras 3 layer.*layer='mmoe'"),
        ({"layer": MMoE(2, 3, 2), "dtype": "float16"}, "`dtype` must not.*float32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LegacyLayer(**arguments)


def test_weights_before_the_first_call_are_refused(tmp_path):
    model, _ = moe_model()
    model.save_weights(tmp_path / "w.weights.h5")
    other = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(3),
            LegacyLayer(MoE(4, (8, 5))),
            tf_keras.layers.Dense(1),
        ]
    )
    other.layers[0].build((None, 3))
    other.layers[2].build((None, 5))
    other.built = True
    with pytest.raises(ValueError, match="Call the layer once"):
        other.load_weights(tmp_path / "w.weights.h5")


# A model of tensorflow-recommenders: retrieval and ranking on one MMoE body.

USERS, MOVIES = 30, 20


class Recommender(tfrs.Model):
    def __init__(self):
        super().__init__()
        self.users = tf_keras.layers.Embedding(USERS, 8)
        self.movies = tf_keras.layers.Embedding(MOVIES, 8)
        self.body = LegacyLayer(MMoE(4, (16, 8), ["watch", "stars"]))
        self.tower = tf_keras.layers.Dense(1)
        self.retrieval = tfrs.tasks.Retrieval(
            metrics=tfrs.metrics.FactorizedTopK(
                tf.data.Dataset.range(MOVIES).batch(MOVIES).map(self.movies), ks=[5]
            )
        )
        self.ranking = tfrs.tasks.Ranking(
            tf_keras.losses.MeanSquaredError(),
            metrics=[tf_keras.metrics.RootMeanSquaredError()],
        )

    def call(self, features):
        shared = self.body(self.users(features["user"]))
        movie = self.movies(features["movie"])
        stars = self.tower(tf.concat([shared["stars"], movie], axis=-1))
        return shared["watch"], movie, stars

    def compute_loss(self, features, training=False):
        user, movie, stars = self(features)
        return self.retrieval(user, movie, compute_metrics=not training) + self.ranking(
            labels=features["stars"], predictions=stars
        )


CLEAN = """
import sys
import numpy as np
import tensorflow as tf

served = tf.saved_model.load(sys.argv[1])
features = np.load(sys.argv[1] + "/features.npz")
user, movie, stars = served.score(features["user"], features["movie"])
np.savez(sys.argv[1] + "/found.npz", user=user, movie=movie, stars=stars)
"""


def test_a_recommender_learns_and_a_clean_process_serves_it(tmp_path):
    rng = np.random.default_rng(0)
    user, movie = rng.integers(0, USERS, 2000), rng.integers(0, MOVIES // 4, 2000)
    movie = movie * 4 + user % 4  # A user sees a quarter of the movies.
    stars = (1 + (user + movie) % 5).astype("float32")[:, None]
    features = {"user": user, "movie": movie, "stars": stars}
    data = tf.data.Dataset.from_tensor_slices(features).batch(100)
    model = Recommender()
    model.compile(tf_keras.optimizers.Adam(0.01))
    before = model.evaluate(data, return_dict=True, verbose=0)
    model.fit(data, epochs=15, verbose=0)
    after = model.evaluate(data, return_dict=True, verbose=0)
    hits = "factorized_top_k/top_5_categorical_accuracy"
    assert after["root_mean_squared_error"] < 0.7 * before["root_mean_squared_error"]
    assert after[hits] > 0.8 > 2 * before[hits]

    ids = tf.TensorSpec([None], "int64")
    model.score = tf.function(
        lambda user, movie: model({"user": user, "movie": movie}),
        input_signature=[ids, ids],
    )
    folder = tmp_path / "served"
    expected = model.score(user[:50], movie[:50])
    model.retrieval.factorized_metrics = None  # A SavedModel takes no such dataset.
    tf.saved_model.save(model, str(folder))
    np.savez(folder / "features.npz", user=user[:50], movie=movie[:50])
    blocked = ["keras_moe", "tensorflow_recommenders"]
    processes.run_without(blocked, CLEAN, tmp_path, str(folder))
    found = np.load(folder / "found.npz")
    for name, tensor in zip(("user", "movie", "stars"), expected, strict=True):
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6)
