"""The signatures that explain, and what reads them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from keras_moe import export
from recsys_examples.movielens import serving
from recsys_examples.movielens.__main__ import main
from recsys_examples.movielens.experts import Contributions
from recsys_examples.movielens.features import HISTORY_LENGTH
from recsys_examples.movielens.fusion import fuse
from recsys_examples.movielens.model import TASKS, build_ranker
from recsys_examples.movielens.profiles import profile_experts
from recsys_examples.movielens.recommendations import ExplainedModel
from tests.support import processes

UNKNOWN_USER = 123_456

# Runs every signature in a process without Keras and without this project.
SERVER = """
import json, sys
import numpy as np
import tensorflow as tf

folder, written = sys.argv[1:]
signatures = tf.saved_model.load(folder).signatures
found = {}

def keep(name, answer):
    for part, values in answer.items():
        values = values.numpy()
        if values.dtype == object:
            values = np.char.decode(values.astype(bytes), "utf-8")
        found[f"{name} {part}"] = values

users = dict(user_id=tf.constant([7, 9, 123456], tf.int64), k=tf.constant(60))
keep("recommend", signatures["recommend"](**users))
keep("explain", signatures["explain"](**users))
history = np.zeros((2, 50), "int64")
history[0, :3] = [4, 10, 999999]
stars = (history > 0) * np.float32(5)
keep("history", signatures["explain_history"](
    history=tf.constant(history), history_ratings=tf.constant(stars), k=tf.constant(60)
))
keep("experts", signatures["experts"]())
keep("movies", signatures["movies"]())
np.savez(written, **found)
print(json.dumps([m for m in ("keras_moe", "recsys_examples") if m in sys.modules]))
"""


@pytest.fixture(scope="module")
def exported(trained, windows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    serving.export_saved_model(
        trained.fit.ranker,
        windows.before_test,
        windows.catalogue,
        folder / "saved_model",
    )
    return folder


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    saved = str(exported / "saved_model")
    blocked = ["keras_moe", "recsys_examples"]
    printed = processes.run_without(blocked, SERVER, folder, saved, "out.npz")
    assert json.loads(printed.splitlines()[-1]) == []
    return dict(np.load(folder / "out.npz"))


@pytest.fixture(scope="module")
def model(exported):
    return ExplainedModel(exported)


def contributions(ranker, features, movies):
    vectors = ranker.towers["watch"].movies.all_movies()[0]
    return [np.array(v) for v in Contributions(ranker)(features, movies, vectors)]


class TestSignatures:
    def test_the_lists_are_those_of_recommend(self, served):
        names = [key.split()[1] for key in served if key.startswith("recommend ")]
        assert {*TASKS, "movie_id", "title", "score", "known_user"} == set(names)
        for name in names:
            np.testing.assert_array_equal(
                served[f"explain {name}"], served[f"recommend {name}"]
            )

    def test_known_users(self, served, trained, windows):
        catalogue = windows.catalogue
        ids = served["explain movie_id"]
        rows = catalogue.rows_of(ids)
        users = windows.before_test.histories(
            catalogue, np.searchsorted(windows.before_test.user_ids, [7, 9])
        )
        gates, own, means = contributions(trained.fit.ranker, users, rows[:2])
        blank = ids == 0
        assert blank[:2].any()
        own[blank[:2]] = 0
        assert np.abs(own).max() > 0.01
        for name, expected in (
            ("gate_weights", gates),
            ("contributions", own),
            ("mean_contributions", means),
        ):
            np.testing.assert_allclose(
                served[f"explain {name}"][:2], expected, rtol=0, atol=1e-5
            )
        assert (served["explain contributions"][blank] == 0).all()
        np.testing.assert_array_equal(
            served["explain year"], np.where(blank, 0, catalogue.years[rows % 60])
        )
        genres = [", ".join(g for g in row if g) for row in catalogue.genres]
        assert served["explain genres"][0, 0] == genres[rows[0, 0]]

    def test_newcomers(self, served, trained, windows):
        """A newcomer's movies are excluded; an unknown id is no movie's."""
        catalogue, ranker = windows.catalogue, trained.fit.ranker
        history = np.zeros((2, HISTORY_LENGTH), "int64")
        history[0, :3] = [4, 10, 999_999]
        latest = windows.before_test.timestamps.max().astype("datetime64[s]")
        year = int(str(latest)[:4])
        features = {
            "user_id": np.zeros(2, "int64"),
            "history": history,
            "history_ratings": ((history > 0) * 5).astype("float32"),
            "last_seen": np.array([year, 0]),
        }
        scores = ranker.catalogue.predict(features, verbose=0)
        fused = np.asarray(fuse(scores))
        ids = served["history movie_id"]
        assert (ids == 0).sum(axis=1).tolist() == [2, 0]
        assert not {4, 10} & {*ids[0].tolist()}
        for b, listed in enumerate(ids):
            rows = catalogue.rows_of(listed[listed > 0])
            assert len({*rows}) == len(rows) == (58, 60)[b]
            assert (np.diff(fused[b, rows]) < 1e-5).all()
        rows = np.where(ids > 0, catalogue.rows_of(ids), 0)
        gates, own, _ = contributions(ranker, features, rows)
        own[ids == 0] = 0
        np.testing.assert_allclose(
            served["history contributions"], own, rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(
            served["history gate_weights"], gates, rtol=0, atol=1e-5
        )
        assert not served["history known_user"].any()

    def test_movies_and_experts(self, served, trained, windows):
        counts = np.bincount(windows.before_test.movies, minlength=60)
        rows = windows.catalogue.rows_of(served["movies movie_id"])
        assert sorted(rows) == [*range(60)]
        assert (np.diff(counts[rows]) <= 0).all()
        assert (
            served["movies title"].tolist() == windows.catalogue.titles[rows].tolist()
        )
        assert served["movies num_movies"] == 60
        ranker = trained.fit.ranker
        profile = profile_experts(ranker, windows.before_test, windows.catalogue)
        assert tuple(served["experts tasks"]) == TASKS
        np.testing.assert_allclose(served["experts weights"], profile.weights)
        for kind in ("genre", "decade", "user"):
            lifts = getattr(profile, kind)
            assert tuple(served[f"experts {kind}"]) == lifts.names
            np.testing.assert_allclose(served[f"experts {kind}_lifts"], lifts.values)

    def test_stars_out_of_range(self, exported):
        client = export.load(exported / "saved_model", "explain_history")
        history = np.zeros((1, HISTORY_LENGTH), "int64")
        stars = np.full((1, HISTORY_LENGTH), 5.5, "float32")
        with pytest.raises(ValueError, match="feature `history_ratings` must be stars"):
            client({"history": history, "history_ratings": stars, "k": 2})


class TestExplainedModel:
    def test_a_user(self, model, served):
        found = model.for_user(7, 60)
        ids = served["explain movie_id"][0]
        assert [movie.movie_id for movie in found.movies] == ids[ids > 0].tolist()
        assert found.known
        first = found.movies[0]
        for movie, score in zip(
            found.movies, served["recommend score"][0], strict=False
        ):
            assert movie.score == pytest.approx(score)
        for t, task in enumerate(TASKS):
            assert first.scores[task] == pytest.approx(served[f"explain {task}"][0, 0])
            np.testing.assert_allclose(
                first.contributions[task],
                served["explain contributions"][0, 0, t],
                rtol=1e-5,
            )
            np.testing.assert_allclose(
                found.gate_weights[task],
                served["explain gate_weights"][0, t],
                rtol=1e-5,
            )
        assert not model.for_user(UNKNOWN_USER, 1).known

    def test_a_newcomer(self, model):
        found = model.for_newcomer([4, 10], 3)
        assert len(found.movies) == 3
        assert not found.known
        other = model.for_newcomer([], 3)
        assert found.gate_weights != other.gate_weights

    def test_out_of_range(self, model):
        with pytest.raises(ValueError, match="k must not exceed the catalogue of 60"):
            model.for_user(7, 61)
        with pytest.raises(ValueError, match="k must be at least 1"):
            model.for_newcomer([4], 0)
        with pytest.raises(ValueError, match="at most 50 movies can be chosen; got 51"):
            model.for_newcomer([4] * 51, 3)


@pytest.fixture(scope="module")
def without_experts(windows, settings, tmp_path_factory):
    """A run of a shared bottom, not trained."""
    folder = tmp_path_factory.mktemp("shared_bottom")
    catalogue, sequences = windows.catalogue, windows.before_test
    ranker = build_ranker(
        catalogue,
        sequences.user_ids,
        np.ones(len(catalogue)),
        replace(settings, body="shared_bottom"),
    )
    serving.export_saved_model(ranker, sequences, catalogue, folder / "saved_model")
    return folder


@pytest.fixture
def old(trained, windows, tmp_path, monkeypatch):
    """A run from before the signatures of this file."""
    monkeypatch.setattr(serving, "add_signatures", lambda *_: None)
    serving.export_saved_model(
        trained.fit.ranker,
        windows.before_test,
        windows.catalogue,
        tmp_path / "saved_model",
    )
    return tmp_path


class TestCommand:
    @pytest.fixture
    def command(self, capfd):
        return processes.in_this_process(main, capfd)

    def test_explain(self, command, exported, served):
        asked = ("recommend", "--user", "7", "--model", exported, "--k", "3")
        status, output, err = command(*asked, "--explain")
        assert (status, err) == (0, "")
        lines = output.splitlines()
        ids = served["explain movie_id"][0, :3]
        for j, movie in enumerate(ids):
            (line,) = [x for x in lines if f"Movie, The {(movie - 1) // 3}th (" in x]
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            assert cells[1] == f"{served['recommend score'][0, j]:.2f}"
            for t, task in enumerate(TASKS):
                assert f"{served[f'explain {task}'][0, j]:.2f}" in line
                own = served["explain contributions"][0, j, t]
                assert "  ".join(f"{c:+5.2f}" for c in own) in line
        (heading,) = (x for x in lines if "experts of watch" in x)
        (names,) = (x for x in lines if x.startswith("┃ movie"))
        assert heading.count("experts of ") == len(TASKS)
        assert [c.strip() for c in names.strip("┃").split("┃")][:3] == [
            *("movie", "score", "watch")
        ]
        text = " ".join(output.split())
        assert "sorted by score = ln p(watch) + ln p(like)" in text
        assert "log odds of watch before calibration" in text
        assert "would fall without the expert, its gate weight 0" in text
        assert "What the experts stand for" in output
        assert "mean of all movies" in output

    def test_an_unknown_user(self, command, exported):
        asked = ("recommend", "--user", "8888", "--model", exported, "--explain")
        status, output, _ = command(*asked)
        assert status == 0
        assert "For unknown user 8888: the list of a new user" in output

    def test_k_too_large(self, command, exported):
        asked = ("recommend", "--user", "7", "--model", exported, "--explain")
        status, _, err = command(*asked, "--k", "61")
        assert status == 2
        assert err == "error: --k 61: k must not exceed the catalogue of 60 movies\n"

    def test_without_experts(self, command, without_experts):
        asked = ("recommend", "--user", "7", "--model", without_experts)
        status, _, err = command(*asked, "--explain")
        assert status == 2
        assert err == (
            f"error: {without_experts / 'saved_model'} has no experts to explain: it "
            "was trained with --body shared_bottom; train with --body mmoe or moe\n"
        )
        assert command(*asked)[0] == 0

    def test_an_old_run(self, command, old):
        asked = ("recommend", "--user", "7", "--model", old)
        status, _, err = command(*asked, "--explain")
        assert status == 2
        assert err == (
            f"error: {old / 'saved_model'} has no signature 'experts': it is of an "
            "older version; train again\n"
        )
        assert command(*asked)[0] == 0


def test_the_file_has_its_constants_once(exported):
    """In the function that all lists come from, and among the movies to choose."""
    content = (exported / "saved_model" / "saved_model.pb").read_bytes()
    assert content.count(b"Movie, The 7th") == 2
