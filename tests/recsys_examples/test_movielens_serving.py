"""The exported files of a ranker, loaded with only TensorFlow or only Keras."""

import json
import os
from dataclasses import replace

import keras
import numpy as np
import pytest

from keras_moe import export
from recsys_examples.errors import InputError
from recsys_examples.movielens.evaluation import predict_pairs, raw_pairs
from recsys_examples.movielens.fusion import fuse
from recsys_examples.movielens.model import TASKS, prediction
from recsys_examples.movielens.serving import export_saved_model, load_recommender
from recsys_examples.movielens.training import fit_ranker
from tests.support import processes

BATCHES = (1, 7, 100)
UNKNOWN_USER = 123_456

# Reads raw features from an npz file and writes the outputs of the signatures. It
# forbids to import Keras: TensorFlow looks for its location but does not import it.
SERVER = """
import importlib.machinery, json, sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name == "keras":
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations.append("nowhere")
            return spec

    def create_module(self, spec):
        raise ImportError(f"{spec.name} must not be imported in this test")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Forbidden())
import numpy as np
import tensorflow as tf

folder, features_path, queries, written = sys.argv[1:]
signatures = tf.saved_model.load(folder).signatures
features = dict(np.load(features_path))
found = {}
for size in (1, 7, 100):
    answer = signatures["serving_default"](
        **{name: tf.constant(values[:size]) for name, values in features.items()}
    )
    for name, values in answer.items():
        found[f"{size} {name}"] = values.numpy()
for name, (users, k) in json.loads(queries).items():
    try:
        answer = signatures["recommend"](
            user_id=tf.constant(users, tf.int64), k=tf.constant(k)
        )
    except tf.errors.InvalidArgumentError as error:
        found[f"{name} error"] = np.array(error.message)
        continue
    for part, values in answer.items():
        values = values.numpy()
        if values.dtype == object:
            values = np.char.decode(values.astype(bytes), "utf-8")
        found[f"{name} {part}"] = values
np.savez(written, **found)
loaded = [m for m in ("keras", "keras_moe", "recsys_examples") if m in sys.modules]
print(json.dumps(loaded))
"""

# The same for the Keras file.
READER = """
import sys
import numpy as np
import keras
import keras_moe

path, features_path, written = sys.argv[1:]
model = keras.models.load_model(path)
arrays = np.load(features_path)
features = {name: keras.ops.convert_to_tensor(v) for name, v in arrays.items()}
np.savez(written, **model.predict(features, verbose=0))
"""


@pytest.fixture(scope="module")
def features(trained, windows) -> dict[str, np.ndarray]:
    """The raw features of 100 pairs, some with unknown users and movies."""
    found = raw_pairs(trained.rows, windows.before_test, windows.catalogue)
    found = {name: values[-100:].copy() for name, values in found.items()}
    assert len(found["year"]) == 100
    found["user_id"][3] = UNKNOWN_USER
    found["movie_id"][4] = 10**9
    found["genres"][5] = ""
    found["history"][6], found["history_ratings"][6] = 0, 0
    return found


@pytest.fixture(scope="module")
def expected(trained, features) -> dict[str, np.ndarray]:
    return predict_pairs(trained.fit.ranker.pairs, features)


@pytest.fixture(scope="module")
def queries(windows) -> dict[str, tuple[list[int], int]]:
    """User ids and k, by name."""
    everybody = windows.before_test.user_ids.tolist()
    size = len(windows.catalogue)
    return {
        "one": ([everybody[4]], 1),
        "ten": ([*everybody, UNKNOWN_USER, 0], 10),
        "all": ([everybody[0], UNKNOWN_USER, everybody[-1]], size),
        "empty": ([], 3),
        "none": ([everybody[4]], 0),
        "minus": ([everybody[4]], -1),
        "more": ([everybody[4]], size + 1),
    }


@pytest.fixture(scope="module")
def exported(trained, windows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    export_saved_model(
        trained.fit.ranker,
        windows.before_test,
        windows.catalogue,
        folder / "saved_model",
    )
    trained.fit.ranker.pairs.save(folder / "model.keras")
    return folder


@pytest.fixture(scope="module")
def served(exported, features, queries, tmp_path_factory) -> dict[str, np.ndarray]:
    """The outputs in a process without Keras and without this project."""
    folder = tmp_path_factory.mktemp("server")
    np.savez(folder / "given.npz", **features)
    printed = processes.run_without(
        ["keras_moe", "recsys_examples"],
        SERVER,
        folder,
        str(exported / "saved_model"),
        "given.npz",
        json.dumps(queries),
        "written.npz",
    )
    assert json.loads(printed.splitlines()[-1]) == []
    return dict(np.load(folder / "written.npz"))


class TestServingDefault:
    @pytest.mark.parametrize("size", BATCHES)
    def test_predictions_equal_those_of_the_trained_model(self, served, expected, size):
        names = {key.split()[1] for key in served if key.startswith(f"{size} ")}
        assert names == set(TASKS)
        for task in TASKS:
            np.testing.assert_allclose(
                served[f"{size} {task}"], expected[task][:size], rtol=0, atol=1e-5
            )
            assert np.ptp(expected[task]) > 0.01

    def test_the_keras_file_requires_only_keras_moe(
        self, exported, features, expected, tmp_path
    ):
        np.savez(tmp_path / "given.npz", **features)
        processes.run_without(
            ["recsys_examples"],
            READER,
            tmp_path,
            str(exported / "model.keras"),
            "given.npz",
            "written.npz",
        )
        found = np.load(tmp_path / "written.npz")
        assert set(found) == set(TASKS)
        for task in TASKS:
            np.testing.assert_allclose(found[task], expected[task], rtol=0, atol=1e-5)


def ranked_in_numpy(trained, windows, user_ids):
    """For each user: fused scores, predictions, and whether the movie was seen."""
    sequences, catalogue = windows.before_test, windows.catalogue
    ranker = trained.fit.ranker
    known = np.isin(user_ids, sequences.user_ids)
    rows = np.where(known, np.searchsorted(sequences.user_ids, user_ids), 0)
    ends = np.where(known, sequences.lengths[rows], 0)
    features = sequences.histories(catalogue, rows, ends)
    features["user_id"][~known] = 0
    scores = ranker.catalogue.predict(features, verbose=0)
    predictions = {
        task: np.asarray(prediction(task, score, ranker.calibration))
        for task, score in scores.items()
    }
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        start = sequences.starts[row]
        seen = np.isin(np.arange(len(catalogue)), sequences.movies[start : start + end])
        predicted = {task: values[i] for task, values in predictions.items()}
        yield np.asarray(fuse(scores))[i], predicted, seen


class TestRecommend:
    @pytest.mark.parametrize("name", ["one", "ten", "all"])
    def test_the_list_is_the_catalogue_ranked(
        self, served, queries, trained, windows, name
    ):
        users, k = queries[name]
        catalogue = windows.catalogue
        assert served[f"{name} movie_id"].shape == (len(users), k)
        for i, (fused, predicted, seen) in enumerate(
            ranked_in_numpy(trained, windows, users)
        ):
            unseen = np.flatnonzero(~seen)
            best = unseen[np.argsort(-fused[unseen])][:k]
            found = {
                part: served[f"{name} {part}"][i]
                for part in ("movie_id", "title", "score", *TASKS)
            }
            # Movies whose scores differ in the last bit may be swapped.
            rows = catalogue.rows_of(found["movie_id"][: len(best)])
            assert len(set(rows)) == len(best)
            assert not seen[rows].any()
            np.testing.assert_allclose(fused[rows], fused[best], rtol=0, atol=1e-5)
            np.testing.assert_allclose(
                found["score"][: len(best)], fused[best], rtol=0, atol=1e-5
            )
            assert (rows == best).mean() > 0.9
            assert found["title"][: len(best)].tolist() == (
                catalogue.titles[rows].tolist()
            )
            for task in TASKS:
                np.testing.assert_allclose(
                    found[task][: len(best)], predicted[task][rows], rtol=0, atol=1e-5
                )
            # Lists of users with fewer than k unseen movies are padded with blanks.
            assert (found["movie_id"][len(best) :] == 0).all()
            assert (found["title"][len(best) :] == "").all()
            for task in TASKS:
                assert (found[task][len(best) :] == 0).all()

    def test_number_of_blanks(self, served, windows):
        blanks = (served["all movie_id"] == 0).sum(axis=1)
        lengths = windows.before_test.lengths
        assert blanks.tolist() == [lengths[0], 0, lengths[-1]]

    def test_personal_and_general_lists(self, served):
        lists = served["ten movie_id"]
        assert len({tuple(movies) for movies in lists[:-2].tolist()}) > 10
        # All unknown users get the same list.
        assert (lists[-1] == lists[-2]).all()
        assert (lists[-1] > 0).all()
        assert served["ten known_user"].tolist() == [True] * (len(lists) - 2) + [
            False,
            False,
        ]

    def test_empty_batch(self, served):
        assert served["empty movie_id"].shape == (0, 3)

    @pytest.mark.parametrize(
        ("name", "rule"),
        [
            ("none", "feature `k` must be at least 1"),
            ("minus", "feature `k` must be at least 1"),
            ("more", "feature `k` must not exceed the catalogue of 60 movies"),
        ],
    )
    def test_k_out_of_range(self, served, name, rule):
        assert rule in str(served[f"{name} error"])


class TestClient:
    """`keras_moe.export.load`: errors that name the feature."""

    @pytest.mark.parametrize(
        ("k", "rule"),
        [(0, "be at least 1"), (61, "not exceed the catalogue of 60 movies")],
    )
    def test_k(self, exported, queries, k, rule):
        client = export.load(exported / "saved_model", "recommend")
        users = queries["one"][0]
        assert client({"user_id": users, "k": 2})["movie_id"].shape == (1, 2)
        with pytest.raises(ValueError, match=f"feature `k` must {rule}"):
            client({"user_id": users, "k": k})

    @pytest.mark.parametrize("stars", [np.nan, np.inf, 5.5, -1.0])
    def test_stars(self, exported, features, stars):
        client = export.load(exported / "saved_model")
        ratings = features["history_ratings"].copy()
        ratings[3, 0] = stars
        with pytest.raises(ValueError, match="feature `history_ratings` must be stars"):
            client({**features, "history_ratings": ratings})


INPUTS = ("user_id", "k")


class TestLoadRecommender:
    @pytest.mark.parametrize("inner", ["", "saved_model"])
    def test_a_run_or_its_saved_model(self, exported, served, queries, inner):
        signature = load_recommender(exported / inner, INPUTS)
        users, k = queries["one"]
        found = signature(
            user_id=keras.ops.convert_to_tensor(users, "int64"),
            k=keras.ops.convert_to_tensor(k, "int32"),
        )
        assert found["movie_id"].numpy() == served["one movie_id"]

    def test_no_model(self, tmp_path):
        for folder in (tmp_path, tmp_path / "absent"):
            with pytest.raises(InputError, match="not a run or a SavedModel") as caught:
                load_recommender(folder, INPUTS)
            assert str(folder) in str(caught.value)

    def test_broken_model(self, tmp_path):
        (tmp_path / "saved_model.pb").write_bytes(b"not a model")
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            load_recommender(tmp_path, INPUTS)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_another_model(self, tmp_path):
        inputs = keras.Input((2,))
        other = keras.Model(inputs, keras.layers.Dense(1)(inputs))
        other.export(tmp_path / "other", verbose=False)
        with pytest.raises(InputError, match='has no signature "recommend"'):
            load_recommender(tmp_path / "other", INPUTS)

    def test_the_model_of_another_example(self, exported):
        with pytest.raises(InputError, match=r"must take \['user_id'\] and return"):
            load_recommender(exported, ("user_id",))


def test_a_sparse_moe(windows, settings, features, tmp_path):
    """Served in batches of several sizes, in a process without keras_moe."""
    moe = replace(settings, body="moe", num_experts=4, learning_rate=0.1, max_epochs=6)
    fit = fit_ranker(windows.before_test, windows.catalogue, moe, verbose=0)
    assert np.isfinite(fit.curves["loss"]).all()
    assert fit.curves["loss"][-1] < fit.curves["loss"][0]
    export_saved_model(
        fit.ranker, windows.before_test, windows.catalogue, tmp_path / "saved_model"
    )
    np.savez(tmp_path / "given.npz", **features)
    user = int(windows.before_test.user_ids[4])
    processes.run_without(
        ["keras_moe", "recsys_examples"],
        SERVER,
        tmp_path,
        "saved_model",
        "given.npz",
        json.dumps({"ten": ([user], 10)}),
        "written.npz",
    )
    served = np.load(tmp_path / "written.npz")
    expected = predict_pairs(fit.ranker.pairs, features)
    for task in TASKS:
        for size in BATCHES:
            np.testing.assert_allclose(
                served[f"{size} {task}"], expected[task][:size], rtol=0, atol=1e-5
            )
        assert np.ptp(expected[task]) > 0.001
    assert len(set(served["ten movie_id"][0])) == 10

    fit.ranker.pairs.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for task, values in predict_pairs(loaded, features).items():
        np.testing.assert_allclose(values, expected[task], rtol=0, atol=1e-5)


def test_the_export_does_not_change_the_ranker(exported, trained, features, expected):
    again = predict_pairs(trained.fit.ranker.pairs, features)
    for task in TASKS:
        np.testing.assert_array_equal(again[task], expected[task])
    assert sorted(os.listdir(exported)) == ["model.keras", "saved_model"]
