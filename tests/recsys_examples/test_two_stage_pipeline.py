"""Both stages trained on a tiny data set, exported, and served by TensorFlow alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from keras_moe import export
from keras_moe.layers import PLE
from recsys_examples.movielens.ranking import RankingTask, rank
from recsys_examples.two_stage import pipeline
from recsys_examples.two_stage.fusion import Fusion
from recsys_examples.two_stage.pipeline import (
    cut_late,
    examples_of,
    fit_first_stages,
    run_second_stage,
)
from recsys_examples.two_stage.ranked import Ranked, as_scorer
from recsys_examples.two_stage.serving import export_saved_model
from recsys_examples.two_stage.settings import LIST_LENGTH, TASKS, Settings
from tests.support import processes

SETTINGS = Settings(
    candidates=20,
    related=8,
    units=8,
    num_experts=2,
    retrieval_epochs=2,
    ranker_epochs=2,
)
UNKNOWN_USER = 123_456


@pytest.fixture(scope="module")
def stages(windows):
    # Training must not use the test window.
    before = replace(windows, test=None, test_task=None)
    return fit_first_stages(before, SETTINGS)


@pytest.fixture(scope="module")
def outcome(windows, stages):
    return run_second_stage(windows, stages, SETTINGS)


class TestTrainingData:
    def test_each_first_stage_has_its_own_past(self, windows, stages):
        assert stages.last.past is windows.before_test
        assert stages.trained.past is windows.train
        early = cut_late(windows.train, SETTINGS.late)
        np.testing.assert_array_equal(stages.early.past.movies, early.movies)
        assert len(early.movies) < len(windows.train.movies)

    def test_tuning_does_not_train_on_validation_or_test(
        self, windows, stages, monkeypatch
    ):
        fitted = []
        fit = pipeline.fit_ranker

        def recorded(examples, *args, **kwargs):
            fitted.append(examples)
            return fit(examples, *args, **kwargs)

        monkeypatch.setattr(pipeline, "fit_ranker", recorded)
        without_test = replace(windows, test=None, test_task=None)
        # Only the final evaluation fails.
        with pytest.raises(AttributeError, match=r"'NoneType'.*users"):
            run_second_stage(without_test, stages, SETTINGS)
        late = examples_of(stages.early, windows.train, SETTINGS)
        validation = examples_of(stages.trained, windows.before_test, SETTINGS)
        tuning, final = fitted
        np.testing.assert_array_equal(tuning.pairs, late.pairs)
        np.testing.assert_array_equal(final.pairs, late.joined(validation).pairs)
        # Positives are candidates among the late ratings.
        rated = len(windows.train.movies) - len(stages.early.past.movies)
        assert 0 < (late.stars > 0).sum() <= rated

    def test_candidates_were_not_seen_before(self, windows, stages):
        until, stage = windows.train, stages.early
        users = np.arange(len(until.user_ids))
        for ends in (stage.past.lengths, until.lengths, np.zeros_like(users)):
            rows = stage.candidates(until, users, ends).rows
            for user, end in enumerate(ends):
                begin = until.starts[user]
                seen = until.movies[begin : begin + end]
                left = min(SETTINGS.candidates, 60 - end)
                assert (rows[user] >= 0).sum() == left
                assert not np.isin(rows[user], seen).any()
                assert len(set(rows[user][:left])) == left

    def test_later_ratings_do_not_change_features(self, windows, stages):
        """Features do not depend on ratings after `ends`."""
        stage, until = stages.early, windows.train
        users, ends = np.arange(5), stage.past.lengths[:5]
        expected = stage.candidates(until, users, ends)
        later = until.movies.copy()
        for user, end in zip(users, ends, strict=True):
            later[until.starts[user] + end : until.starts[user + 1]] = 0
        stars = np.where(later != until.movies, 1.0, until.ratings).astype("float32")
        changed = replace(until, movies=later, ratings=stars)
        for found, wanted in zip(
            stage.candidates(changed, users, ends), expected, strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


class TestMetrics:
    def test_lists_are_evaluated_like_full_rankings(self, windows, outcome):
        """The list of the best movies has the NDCG and recall of the full scores."""
        task = windows.test_task
        rng = np.random.default_rng(1)
        scores = rng.normal(size=(len(windows.test.user_ids), 60))
        ranked = np.where(task.seen.toarray() > 0, -np.inf, scores)[task.users]
        lists = np.argsort(-ranked, axis=1)[:, :LIST_LENGTH]
        found = rank(as_scorer(task, lists), task)
        expected = rank(lambda users: scores[users], task)
        assert found == pytest.approx(expected)

    def test_figures(self, windows, outcome):
        metrics = outcome.metrics
        assert 0 < metrics["ndcg@10"] < 1
        assert metrics["recall@10"] <= metrics["recall@candidates"] <= 1
        assert outcome.funnel[10] < outcome.funnel[20] < outcome.funnel[50]
        ranked = Ranked(outcome.stage, windows.test_task)
        own = rank(as_scorer(ranked.task, ranked.rows), ranked.task, 20)["recall@20"]
        # The index lacks movies with few ratings.
        assert metrics["recall@candidates"] == pytest.approx(own, abs=0.05)
        for name in ("", " without diversity", " of retrieval"):
            assert 0 < metrics[f"diversity@10{name}"] < 1

    def test_the_fast_ndcg_equals_rank(self, windows, outcome):
        ranked = Ranked(outcome.stage, windows.test_task)
        for lists in (ranked.rows[:, :LIST_LENGTH], ranked.rows[:, ::-2]):
            lists = lists[:, :LIST_LENGTH]
            expected = rank(as_scorer(ranked.task, lists), ranked.task)["ndcg@10"]
            assert ranked.ndcg(lists) == pytest.approx(expected)
        # A list of one hit, with two relevant movies:
        # 1 / (1 + 1 / log2(3)) = 0.6131.
        task = RankingTask(
            seen=sparse.csr_matrix((1, 60)),
            relevant=sparse.csr_matrix(([1.0, 1.0], ([0, 0], [7, 8])), (1, 60)),
        )
        ranked.task = task
        blanks = np.full((1, LIST_LENGTH), -1)
        blanks[0, 0] = 7
        assert ranked.ndcg(blanks) == pytest.approx(0.6131, abs=1e-4)

    def test_retrieval_alone_equals_the_ranking_by_its_scores(self, windows, outcome):
        stage, task = outcome.stage, windows.test_task
        everyone = np.arange(len(stage.past.user_ids))
        histories = stage.past.histories(windows.catalogue, everyone)
        scores = stage.retrieval.scores(histories)
        expected = rank(lambda users: scores[users], task)["ndcg@10"]
        assert outcome.metrics["ndcg@10 of retrieval"] == pytest.approx(expected)

    def test_fusion_and_diversity_are_tuned_on_validation(self, outcome):
        chosen = outcome.chosen
        tried = {(like, r): ndcg for like, r, ndcg in chosen["validation_weights"]}
        fusion = outcome.fusion
        best = tried[fusion.like, fusion.rating]
        assert best == max(tried.values())
        assert len(tried) == len(SETTINGS.like_weights) * len(SETTINGS.rating_weights)
        kept = {
            float(diversity)
            for diversity, quality in chosen["validation_diversity"].items()
            if quality["ndcg@10"] >= (1 - SETTINGS.tolerance) * best
        }
        assert fusion.diversity == max(kept | {0.0})

    def test_diversity_grows_with_its_weight(self, windows, outcome):
        ranked = Ranked(outcome.stage, windows.test_task)
        scores = ranked.predict(outcome.ranker)
        found = [
            ranked.quality(ranked.lists(scores, Fusion(diversity=d)))["diversity@10"]
            for d in (0.0, 1.0, 100.0)
        ]
        assert found[0] < found[1] < found[2]


def test_ple_ranker(windows, stages):
    ple = replace(SETTINGS, ranker="ple", ranker_epochs=1)
    outcome = run_second_stage(windows, stages, ple)
    assert 0 < outcome.metrics["ndcg@10"] < 1
    assert any(isinstance(layer, PLE) for layer in outcome.ranker.layers)


# Calls the signatures, importing only TensorFlow.
SERVER = """
import json, sys
import numpy as np
import tensorflow as tf

folder, written = sys.argv[1:]
signatures = tf.saved_model.load(folder).signatures
users = tf.constant(np.load("users.npy"))
lists = signatures["recommend"](user_id=users)
found = {f"users {n}": v.numpy() for n, v in lists.items()}
raw = {n: tf.constant(v) for n, v in np.load("raw.npz").items()}
for n, v in signatures["serving_default"](**raw).items():
    found[f"raw {n}"] = v.numpy()
found = {
    n: np.char.decode(v.astype(bytes), "utf-8") if v.dtype == object else v
    for n, v in found.items()
}

def error(**features):
    try:
        signatures["serving_default"](**features)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        return str(error)
    return "none"

nan = raw["history_ratings"].numpy().copy()
nan[1, 0] = np.nan
errors = {
    "missing": error(**{n: v for n, v in raw.items() if n != "history"}),
    "extra": error(**raw, colour=users),
    "nan": error(**{**raw, "history_ratings": tf.constant(nan)}),
    "high": error(**{**raw, "history_ratings": raw["history_ratings"] + 9}),
}
np.savez(written, **found)
loaded = [m for m in ("keras", "keras_moe", "recsys_examples") if m in sys.modules]
print(json.dumps([errors, loaded]))
"""


@pytest.fixture(scope="module")
def exported(outcome, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "saved_model"
    export_saved_model(outcome.stage, outcome.ranker, outcome.fusion, folder)
    return folder


@pytest.fixture(scope="module")
def raw(windows):
    """Features of four users, an unknown user with user 3's history, an empty one."""
    past = windows.before_test
    features = past.histories(windows.catalogue, np.array([0, 1, 2, 3, 3, 4]))
    features["user_id"][4] = UNKNOWN_USER
    for values in features.values():
        values[5] = 0
    return features


@pytest.fixture(scope="module")
def served(exported, windows, raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    np.save(
        folder / "users.npy", np.append(windows.before_test.user_ids, [UNKNOWN_USER, 0])
    )
    np.savez(folder / "raw.npz", **raw)
    printed = processes.run_without(
        ["keras_moe", "keras_rs", "recsys_examples"],
        SERVER,
        folder,
        str(exported),
        "written.npz",
    )
    errors, loaded = json.loads(printed.splitlines()[-1])
    assert loaded in ([], ["keras"])
    return dict(np.load(folder / "written.npz")), errors


class TestServing:
    def test_lists_equal_the_evaluated_ones(self, windows, outcome, served):
        task, found = windows.test_task, served[0]
        ranked = Ranked(outcome.stage, task)
        lists = ranked.lists(ranked.predict(outcome.ranker), outcome.fusion)
        expected = np.where(lists < 0, 0, windows.catalogue.movie_ids[lists])
        same = found["users movie_id"][task.users] == expected
        # Movies whose scores differ in the last bit may be swapped.
        assert same.mean() > 0.98
        rows = windows.catalogue.rows_of(found["users movie_id"])
        titles = np.where(
            found["users movie_id"] > 0, windows.catalogue.titles[rows], ""
        )
        np.testing.assert_array_equal(found["users title"], titles)

    def test_seen_movies_are_excluded(self, windows, served):
        found, past = served[0], windows.before_test
        for user, movies in enumerate(found["users movie_id"][: len(past.user_ids)]):
            seen = past.movies[past.starts[user] : past.starts[user + 1]]
            assert not np.isin(movies, windows.catalogue.movie_ids[seen]).any()
            listed = movies[movies > 0]
            assert len(set(listed)) == len(listed) == LIST_LENGTH
        for task in TASKS:
            assert np.isfinite(found[f"users {task}"]).all()
        for task in ("watch", "like"):
            values = found[f"users {task}"]
            assert ((values > 0) & (values < 1)).all()

    def test_unknown_users_get_the_same_list(self, served):
        found = served[0]
        assert found["users known_user"].tolist() == [True] * 41 + [False] * 2
        lists = found["users movie_id"]
        np.testing.assert_array_equal(lists[-1], lists[-2])
        assert (lists[-1] > 0).all()

    def test_raw_features_give_the_same_lists(self, served):
        found = served[0]
        lists, scores = found["raw movie_id"], found["raw score"]
        # These users have seen fewer than 50 movies, the length of the history.
        np.testing.assert_array_equal(lists[:4], found["users movie_id"][:4])
        np.testing.assert_allclose(scores[:4], found["users score"][:4], atol=1e-4)

    def test_an_unknown_user_with_a_history(self, raw, served):
        found = served[0]
        assert not np.isin(found["raw movie_id"][4], raw["history"][4]).any()
        assert (found["raw movie_id"][4] > 0).all()

    def test_an_unknown_movie_counts_as_padding(self, client, raw):
        blank = {name: values[:1].copy() for name, values in raw.items()}
        blank["history"][0, 1], blank["history_ratings"][0, 1] = 0, 0.0
        unknown = {name: values.copy() for name, values in blank.items()}
        unknown["history"][0, 1], unknown["history_ratings"][0, 1] = 10**9, 0.5
        expected, found = client(blank), client(unknown)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)

    def test_an_empty_history(self, served):
        found = served[0]
        # The same list as that of an unknown user.
        np.testing.assert_array_equal(
            found["raw movie_id"][5], found["users movie_id"][-1]
        )

    @pytest.mark.parametrize(
        ("error", "feature"),
        [
            ("missing", "history"),
            ("extra", "colour"),
            ("nan", "feature `history_ratings` must be stars from 0 to 5"),
            ("high", "feature `history_ratings` must be stars from 0 to 5"),
        ],
    )
    def test_errors_name_the_feature(self, served, error, feature):
        assert feature in served[1][error]


@pytest.fixture(scope="module")
def client(exported):
    return export.load(exported)


class TestClient:
    """`keras_moe.export.load`: answers, and errors that name the feature."""

    def test_lists(self, client, raw, served):
        np.testing.assert_array_equal(
            client(raw)["movie_id"], served[0]["raw movie_id"]
        )

    def test_users(self, exported, windows, served):
        client = export.load(exported, "recommend")
        answer = client({"user_id": windows.before_test.user_ids[:3]})
        np.testing.assert_array_equal(
            answer["movie_id"], served[0]["users movie_id"][:3]
        )

    def test_an_empty_batch(self, client, raw):
        answer = client({name: v[:0] for name, v in raw.items()})
        assert answer["movie_id"].shape == (0, LIST_LENGTH)

    @pytest.mark.parametrize(
        ("feature", "value"),
        [
            ("history", None),
            ("colour", [1] * 6),
            ("last_seen", np.full(6, 2000.0)),
            ("last_seen", ["now"] * 6),
            ("history", np.ones((6, 1), "int64")),
            ("history_ratings", np.full((6, 50), np.nan, "float32")),
        ],
    )
    def test_errors_name_the_feature(self, client, raw, feature, value):
        features = {**raw, feature: value}
        if value is None:
            del features[feature]
        with pytest.raises(ValueError, match=feature):
            client(features)
