"""The tensorflow-recommenders stack, in a process whose `tf.keras` is Keras 2."""

import json
from pathlib import Path

import pytest

from tests.recsys_examples.test_movielens_command import write_csv
from tests.support import processes

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from pathlib import Path

from recsys_examples.two_stage import tfrs_stack
import keras, numpy as np, tensorflow as tf, tensorflow_recommenders as tfrs, tf_keras
from recsys_examples.movielens.data import load_movielens
from recsys_examples.movielens.pipeline import make_windows
from recsys_examples.two_stage import pipeline, ranked, serving
from recsys_examples.two_stage.retrieval import UnseenRetrieval
from recsys_examples.two_stage.settings import Settings

windows = make_windows(load_movielens(sys.argv[1]))
settings = Settings(
    stack="tfrs", candidates=20, related=8, units=8, retrieval_epochs=3, ranker_epochs=1
)
made = []
init = tfrs_stack.TwoTowers.__init__
def recorded(self, *arguments):
    made.append(self)
    init(self, *arguments)
tfrs_stack.TwoTowers.__init__ = recorded

stages = pipeline.fit_first_stages(windows, settings)
curves = stages.trained.retrieval.curves
outcome = pipeline.run_second_stage(windows, stages, settings)
serving.export_saved_model(outcome.stage, outcome.ranker, outcome.fusion, Path("saved"))

rng = np.random.default_rng(0)
movies = rng.normal(size=(50, 6)).astype("float32")
queries = tf.constant(rng.normal(size=(4, 6)), tf.float32)
hidden = rng.random((4, 50)) < 0.5
hidden[3, 5:] = True
hidden[3, :5] = False
seen = tf.constant(np.argwhere(hidden))
ours = tfrs_stack.UnseenIndex(movies, 10)((queries, seen))
theirs = UnseenRetrieval(movies, k=10)((queries, seen))
real = theirs[0] > -1e8

ranked = ranked.Ranked(outcome.stage, windows.test_task)
lists = ranked.lists(ranked.predict(outcome.ranker), outcome.fusion)
expected = np.where(lists < 0, 0, windows.catalogue.movie_ids[lists])
users = windows.before_test.user_ids[windows.test_task.users]
np.savez("expected.npz", lists=expected, users=users)
rows = tf.cast(theirs[1], ours[1].dtype)
same_rows = tf.reduce_all((ours[1] == rows) | ~real)
apart = tf.reduce_max(tf.where(real, tf.abs(ours[0] - theirs[0]), 0.0))
print(json.dumps({
    "same": tf.keras.Model is tf_keras.Model,
    "tfrs": all(isinstance(model, tfrs.Model) for model in made),
    "models": len(made),
    "keras": [keras.version().split(".")[0], tf_keras.__version__.split(".")[0]],
    "loss": curves["loss"],
    "top": curves["val_factorized_top_k/top_10_categorical_accuracy"],
    "epochs": stages.trained.retrieval.epochs,
    "index": type(outcome.stage.index.find.index).__name__,
    "same_rows": bool(same_rows),
    "same_scores": float(apart),
    "left": tf.reduce_sum(tf.cast(ours[0] > -1e8, tf.int32), 1).numpy().tolist(),
    "unseen": (~hidden).sum(1).tolist(),
    "metrics": outcome.metrics,
}))
"""

SERVER = """
import sys
import numpy as np
import tensorflow as tf

expected = np.load("expected.npz")
model = tf.saved_model.load("saved")
answer = model.signatures["recommend"](user_id=tf.constant(expected["users"]))
print((answer["movie_id"].numpy() == expected["lists"]).mean())
"""


@pytest.fixture(scope="module")
def folder(movielens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfrs")
    write_csv(folder / "ml", movielens)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    done = processes.run(
        ["-c", SCRIPT, "ml"], folder, PYTHONPATH=str(ROOT), KERAS_BACKEND="tensorflow"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_trained_by_tfrs_beside_keras_3(found):
    assert found["tfrs"] is True
    assert found["models"] == 3
    assert found["keras"] == ["3", "2"]
    assert found["same"] is True
    assert found["loss"][-1] < found["loss"][0]
    # The best epoch by tfrs' metric on validation.
    assert 1 <= found["epochs"] <= len(found["top"]) == 3
    assert all(0 < top <= 1 for top in found["top"])


def test_the_index_equals_that_of_keras_rs(found):
    assert found["index"] in ("BruteForce", "ScaNN")
    if found["index"] == "BruteForce":
        assert found["same_rows"]
        assert found["same_scores"] < 1e-5
    assert found["left"] == [min(10, unseen) for unseen in found["unseen"]]
    assert found["left"][3] == 5


def test_metrics(found):
    assert 0 < found["metrics"]["ndcg@10"] < 1
    assert 0 < found["metrics"]["recall@candidates"] <= 1


def test_saved_model(found, folder):
    printed = processes.run_without(
        ["keras_moe", "tensorflow_recommenders", "recsys_examples"], SERVER, folder
    )
    assert float(printed.splitlines()[-1]) > 0.98


def test_tfrs_missing(folder):
    done = processes.run(
        [
            "-c",
            "import sys; sys.modules['tensorflow_recommenders'] = None\n"
            "from recsys_examples.two_stage.__main__ import main\n"
            "sys.exit(main(['--stack', 'tfrs', '--data-dir', 'ml', '--out', 'out']))",
        ],
        folder,
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == 2
    # TensorFlow prints log messages before.
    assert done.stderr.splitlines()[-1].startswith("error: --stack tfrs: ")
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()
