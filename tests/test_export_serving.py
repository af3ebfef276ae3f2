"""What `keras_moe.export` adds to a SavedModel: raw features, warm-up, named errors."""

import re

import keras
import numpy as np
import pytest

from keras_moe import export
from keras_moe.layers import MMoE, Tower
from keras_moe.multitask import MultiTaskModel

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
)
TASKS = ("add-to.cart", "click")
RAW = {
    "age": np.array([[30.0], [41.0], [52.0], [63.0]], "float32"),
    "city": np.array([["Rome"], ["Oslo"], ["Rome"], ["Bonn"]]),
    "visits": np.array([[1], [0], [7], [3]], "int32"),
}


@pytest.fixture(scope="module")
def space():
    import tensorflow as tf

    space = keras.utils.FeatureSpace(
        {
            "age": keras.utils.FeatureSpace.float_normalized(),
            "city": keras.utils.FeatureSpace.string_categorical(num_oov_indices=1),
            "visits": keras.utils.FeatureSpace.integer_categorical(num_oov_indices=1),
        },
        output_mode="concat",
    )
    rows = {name: values[:, 0] for name, values in RAW.items()}
    space.adapt(tf.data.Dataset.from_tensor_slices(rows))
    return space


@pytest.fixture(scope="module")
def model(space):
    width = space.get_encoded_features().shape[-1]
    inputs = keras.Input((width,), name="encoded")
    shared = MMoE(3, (8, 4), TASKS)(inputs)
    return MultiTaskModel(inputs, {task: Tower(())(shared[task]) for task in TASKS})


@pytest.fixture(scope="module")
def folder(model, space, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "ranker" / "1"
    requests = [RAW, {name: value[:1].tolist() for name, value in RAW.items()}]
    export.export_saved_model(model, folder, preprocessing=space, warmup=requests)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return export.load(folder)


def test_raw_features_come_in_and_all_tasks_out(served, model, space):
    expected = model(space({name: values[:, 0] for name, values in RAW.items()}))
    found = served(RAW)
    assert set(found) == set(served.tasks) == set(TASKS)
    for task in TASKS:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-5, atol=1e-6)
    unknown = {**RAW, "city": np.array([["Atlantis"]] * 4)}
    assert np.isfinite(served(unknown)["click"]).all()


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_a_signature(task, folder, served):
    found = export.load(folder, task)(RAW)
    assert set(found) == {task}
    np.testing.assert_allclose(found[task], served(RAW)[task], rtol=1e-6)
    with pytest.raises(ValueError, match=r"`signature` must be one of.*'click'"):
        export.load(folder, "buy")


def test_preprocessing_may_be_a_model_and_inputs_a_list(tmp_path):
    raw = [keras.Input((1,), name=name, dtype="string") for name in ("city", "shop")]
    index = keras.layers.StringLookup(vocabulary=["Rome", "Oslo"], output_mode="int")
    before = keras.Model(raw, [index(tensor) for tensor in raw])
    inputs = [keras.Input((1,), name=name, dtype="int64") for name in ("a", "b")]
    apart = keras.ops.cast(inputs[0] - 10 * inputs[1], "float32")
    after = keras.Model(inputs, {"score": keras.layers.Identity()(apart)})
    export.export_saved_model(after, tmp_path / "1", preprocessing=before)
    # Rome is 1, Oslo 2, all else 0: 1 - 20 and 0 - 10.
    rows = {"shop": [["Oslo"], ["Rome"]], "city": [["Rome"], ["Bonn"]]}
    assert export.load(tmp_path / "1")(rows)["score"].tolist() == [[-19.0], [-10.0]]
    with pytest.raises(ValueError, match="`preprocessing` must be a functional"):
        export.export_saved_model(after, tmp_path / "2", preprocessing=index)


def test_tensorflow_serving_reads_the_warm_up(folder, served):
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    logs = [prediction_log_pb2.PredictionLog.FromString(data) for data in records]
    for log, n in zip(logs, (4, 1), strict=True):
        request = log.predict_log.request
        assert request.model_spec.signature_name == "serving_default"
        given = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        found = served(given)
        assert found["click"].shape == (n, 1)
        np.testing.assert_allclose(found["click"], served(RAW)["click"][:n], rtol=1e-5)


WRONG = {
    "feature `city` is missing": {"city": None},
    "feature `country` is unknown": {"country": RAW["city"]},
    "feature `age` must be of dtype float32. Received: float64": {
        "age": RAW["age"].astype("float64")
    },
    "feature `age` must be of dtype float32. Received: <U4": {
        "age": RAW["city"].tolist()
    },
    "feature `city` must be of dtype string. Received: int32": {"city": RAW["visits"]},
    "feature `visits` must be of dtype int32. Received: float64": {
        "visits": [[1.5]] * 4
    },
    "feature `visits` must be of dtype int32. Received: Python int": {
        "visits": [[2**63]] * 4
    },
    "feature `age` must be of dtype float32. Received: setting": {
        "age": [[1.0], [1.0, 2.0]]
    },
    "feature `age` must be of shape (None, 1)": {"age": RAW["age"][:, 0]},
    "same batch size. Received: {'age': 2, 'city': 4": {"age": RAW["age"][:2]},
    "feature `age` must hold no NaN": {"age": np.full((4, 1), np.nan, "float32")},
    "feature `age` must hold no NaN and no infinity": {
        "age": np.full((4, 1), np.inf, "float32")
    },
    "feature `city` must be of dtype string. Received: None": {
        "city": [["Rome"], [None], ["Oslo"], ["Rome"]]
    },
    "feature `city` must be of dtype string. Received: 3": {
        "city": np.array([["Rome"], [3], ["Oslo"], ["Rome"]], object)
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_feature_is_named(message, served):
    request = {
        name: value
        for name, value in {**RAW, **WRONG[message]}.items()
        if value is not None
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        served(request)


def test_a_wrong_warm_up_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(ValueError, match="feature `encoded` is missing"):
        export.export_saved_model(model, tmp_path / "1", warmup=[{"x": [[1.0]]}])
    with pytest.raises(ValueError, match="must be a dict of the features"):
        export.export_saved_model(model, tmp_path / "1", warmup=[[1.0]])
    nan = np.full((1, model.inputs[0].shape[-1]), np.nan, "float32")
    with pytest.raises(ValueError, match="feature `encoded` must hold no NaN"):
        export.export_saved_model(model, tmp_path / "1", warmup=[{"encoded": nan}])
    assert list(tmp_path.iterdir()) == []


def test_the_graph_itself_refuses_nan_by_name(folder):
    """So does TensorFlow Serving, which knows nothing of `load`."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    inputs = {name: tf.constant(value) for name, value in RAW.items()}
    inputs["age"] = tf.constant([[1.0], [np.nan], [2.0], [3.0]])
    for name in ("serving_default", "click"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="feature `age` must"):
            loaded.signatures[name](**inputs)


def test_nan_may_be_a_value(tmp_path):
    inputs = keras.Input((1,), name="age")
    known = keras.ops.where(keras.ops.isnan(inputs), 7.0, inputs)
    model = keras.Model(inputs, {"age_or_7": known})
    export.export_saved_model(model, tmp_path / "1", refuse_nan=False)
    found = export.load(tmp_path / "1")({"age": [[float("nan")], [2.0]]})
    assert found["age_or_7"].tolist() == [[7.0], [2.0]]
