"""Ids outside of an embedding: a SavedModel names feature, rule and value."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from keras_moe import export
from keras_moe.layers import MMoE, Tower
from keras_moe.multitask import MultiTaskModel

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
)
TASKS = ["click", "stars"]


def ids(name, *shape, dtype="int64"):
    return keras.Input(shape, dtype=dtype, name=name)


def build():
    """A model with a feature for each way to an embedding, most of 10 rows."""

    def table(ids, rows=10):
        return layers.Embedding(rows, 2)(ids)

    dtypes = {name: ids(name, dtype=name) for name in DTYPES}
    user, item, reshaped = ids("user"), ids("item"), ids("reshaped", 1)
    thrice = ids("thrice")
    columns, shared = ids("columns", 2), ids("shared", 3)
    word = ids("word", dtype="string")
    # The table is smaller than the vocabulary: "k" is row 10.
    words = layers.StringLookup(vocabulary=[*"bcdefghijk"])(word)
    first, second = ids("first"), ids("second")
    flag = ids("flag", dtype="bool")
    towers = keras.Model([first, second], [table(first), table(second, 20)])
    nested = ids("nested_user"), ids("nested_item")
    row = keras.Sequential([ids("row"), layers.Embedding(10, 2)])
    named = {"a": ids("a"), "b": ids("b")}
    by_name = keras.Model(named, [row(named["b"] + 0), table(named["a"], 20)])
    pair = {"b": ids("pair_user"), "a": ids("pair_item")}
    vectors = [
        table(user),
        table(flag, 1),
        table(layers.Reshape((1, 1))(keras.ops.squeeze(reshaped, -1)[:, None])),
        table(columns[:, 0]),
        table(columns[:, 1], 100),
        table(shared, 50),
        table(shared),
        table(words),
        table(3 * thrice + item),
        *map(table, dtypes.values()),
        *towers(list(nested)),
        *by_name(pair),
    ]
    joined = layers.Concatenate()([layers.Flatten()(vector) for vector in vectors])
    mixed = MMoE(3, (4,), TASKS)(joined)
    inputs = [
        user,
        flag,
        thrice,
        item,
        reshaped,
        columns,
        shared,
        word,
        *dtypes.values(),
        *nested,
    ]
    return MultiTaskModel(
        [*inputs, *pair.values()], {task: Tower(())(mixed[task]) for task in TASKS}
    )


DTYPES = ("int8", "uint8", "int32", "uint64", "float16", "float32")
# All of them are in range.
REQUEST = {
    "user": [0, 9],
    "flag": [False, False],
    "thrice": [0, 3],
    "item": [9, 0],
    "reshaped": [[0], [9]],
    "columns": [[9, 99], [0, 0]],
    "shared": [[0, 1, 9], [9, 9, 9]],
    "word": ["j", "unknown"],
    **{name: np.array([0, 9], name) for name in DTYPES},
    "nested_user": [9, 0],
    "nested_item": [19, 0],
    "pair_user": [9, 0],
    "pair_item": [19, 0],
}
# By what is wrong: the values of one feature, the message.
WRONG = {
    "beyond": {"user": [3, 12]},
    "negative": {"user": [0, -1]},
    "largest": {"user": [0, 2**63 - 1]},
    "smallest": {"user": [-(2**63), 0]},
    "reshaped": {"reshaped": [[0], [10]]},
    "a column": {"columns": [[10, 9], [0, 0]]},
    "the other column": {"columns": [[9, 100], [0, 0]]},
    "the smaller table": {"shared": [[0, 0, 0], [0, 10, 0]]},
    "looked up": {"word": ["j", "k"]},
    "nested": {"nested_user": [10, 0]},
    "nested, the other": {"nested_item": [20, 0]},
    "nested by name": {"pair_user": [10, 0]},
    "nested by name, the other": {"pair_item": [20, 0]},
    "crossed": {"item": [10, 0]},
    "flag": {"flag": [False, True]},
    **{name: {name: np.array([0, 10], name)} for name in DTYPES},
}
MESSAGES = {
    "flag": "feature `flag` must hold ids with 0 <= id < 1. Received: 1",
    "beyond": "feature `user` must hold ids with 0 <= id < 10. Received: 12",
    "negative": "feature `user` must hold ids with 0 <= id < 10. Received: -1",
    "largest": "`user` must hold ids with 0 <= id < 10. Received: 9223372036854775807",
    "smallest": "`user` must hold ids with 0 <= id < 10. Received: -92233720368547758",
    "the other column": "`columns` must hold ids with 0 <= id < 100. Received: 100",
    "nested, the other": "`nested_item` must hold ids with 0 <= id < 20. Received: 20",
    "nested by name, the other": (
        "`pair_item` must hold ids with 0 <= id < 20. Received: 20"
    ),
    "crossed": (
        "features `item` and `thrice` must hold ids with 0 <= id < 10. Received: 10"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids") / "1"
    export.export_saved_model(build(), folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return {name: export.load(folder, name) for name in ("serving_default", "stars")}


@pytest.mark.parametrize("case", WRONG)
def test_an_id_outside_of_its_embedding_is_named(case, served):
    (name,) = WRONG[case]
    message = f"feature `{name}` must hold ids with 0 <= id < 10. Received: 10"
    for serve in served.values():
        assert np.isfinite(serve(REQUEST)["stars"]).all()
        with pytest.raises(ValueError, match=re.escape(MESSAGES.get(case, message))):
            serve({**REQUEST, **WRONG[case]})


def _direct():
    user = ids("user")
    return keras.Model(user, {"score": layers.Embedding(10, 2)(user)})


def test_the_graph_itself_names_it(tmp_path):
    import tensorflow as tf

    export.export_model(_direct(), tmp_path / "1", "tf_saved_model")
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    serve = loaded.signatures["serving_default"]
    wrong = tf.constant([3, 12], tf.int64)
    message = r"\[feature `user` must hold ids with 0 <= id < 10. Received:\] \[12\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        serve(user=wrong)
    compiled = tf.function(lambda user: serve(user=user), jit_compile=True)
    assert compiled(wrong)["score"].shape == (2, 2)  # XLA removes the check


def test_an_empty_batch_has_no_wrong_ids(tmp_path):
    export.export_saved_model(_direct(), tmp_path / "1")
    found = export.load(tmp_path / "1")({"user": np.zeros(0, "int64")})
    assert found["score"].shape == (0, 2)


def test_a_warm_up_with_a_wrong_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`user` must hold ids .* Received: 10"):
        export.export_saved_model(_direct(), tmp_path / "1", warmup=[{"user": [10]}])
    assert list(tmp_path.iterdir()) == []


def test_ids_may_count_from_the_end(tmp_path):
    model = _direct()
    with pytest.raises(ValueError, match="`check_ids` must be"):
        export.export_saved_model(model, tmp_path / "1", check_ids="no")
    export.export_saved_model(model, tmp_path / "1", check_ids=False)
    found = export.load(tmp_path / "1")({"user": [-1, 9]})["score"]
    assert found[0].tolist() == found[1].tolist()


def _assertions(folder):
    import tensorflow as tf

    graph = tf.saved_model.load(str(folder)).signatures["serving_default"].graph
    functions = graph.as_graph_def().library.function
    return sum(node.op == "Assert" for f in functions for node in f.node_def)


class Custom(layers.Layer):
    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(10, 2)

    def call(self, rows):
        return self.table(rows)


def test_other_ids_are_left_as_they_are(tmp_path):
    """Inside of a custom layer, always in range, or computed by weights."""
    inputs = {
        "user": ids("user"),
        "word": ids("word", dtype="string"),
        "shop": ids("shop", dtype="string"),
        "year": ids("year", 1),
        "text": ids("text", 3, dtype="int32"),
    }
    vectors = layers.Embedding(4, 2, name="words")(inputs["text"])
    vocabulary = layers.StringLookup(vocabulary=["a", "b"])
    flag = inputs["flag"] = ids("flag", dtype="bool")
    row = ids("row", dtype="int64")
    nested = keras.Model(row, layers.Embedding(3, 2)(row))
    outputs = {
        "flags": layers.Embedding(2, 2)(flag),
        "nested": nested(vocabulary(inputs["word"])),
        "custom": Custom()(inputs["user"]),
        "word_": layers.Embedding(3, 2)(vocabulary(inputs["word"])),
        "shop_": layers.Embedding(5, 2)(layers.Hashing(5)(inputs["shop"])),
        "year_": layers.Embedding(3, 2)(
            layers.Discretization([1.0, 2.0])(inputs["year"])
        ),
        "best": layers.Embedding(2, 2)(
            keras.ops.argmax(layers.Dense(2)(vectors), axis=-1)
        ),
    }
    export.export_saved_model(
        keras.Model(inputs, outputs), tmp_path / "1", refuse_nan=False
    )
    assert _assertions(tmp_path / "1") == 1  # of `text`
