"""The ranker: bodies, tasks, and consistency of its models."""

import itertools
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

from keras_moe.layers import MMoE, MoE, SharedBottom
from recsys_examples.movielens.evaluation import predict_pairs
from recsys_examples.movielens.features import Catalogue
from recsys_examples.movielens.model import (
    TASKS,
    Calibration,
    build_ranker,
    prediction,
)
from recsys_examples.movielens.study import shared_bottom_of_equal_size

SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(TASKS, n)]


def build(windows, settings, **kwargs):
    """A ranker with random weights, for which all scores differ."""
    popularity = np.bincount(windows.train.movies, minlength=len(windows.catalogue))
    ranker = build_ranker(
        windows.catalogue, windows.train.user_ids, popularity, settings, **kwargs
    )
    rng = np.random.default_rng(0)
    pooling = next(
        w for w in ranker.pairs.trainable_variables if "recency_pools" in w.path
    )
    for variable in ranker.pairs.trainable_variables:
        if variable is not pooling:
            variable.assign_add(rng.normal(0, 0.2, variable.shape))
    return ranker


def users_at(windows, users, ends=None) -> dict[str, np.ndarray]:
    return windows.before_test.histories(windows.catalogue, users, ends)


def with_movies(users: dict[str, np.ndarray], catalogue: Catalogue, rows) -> dict:
    """The raw features of one (user, movie) pair per row."""
    return {
        **users,
        "movie_id": catalogue.movie_ids[rows],
        "genres": catalogue.genres[rows],
        "year": catalogue.years[rows],
    }


def every_pair(users: dict[str, np.ndarray], catalogue: Catalogue) -> dict:
    size = len(users["user_id"])
    repeated = {name: np.repeat(v, len(catalogue), axis=0) for name, v in users.items()}
    return with_movies(repeated, catalogue, np.tile(np.arange(len(catalogue)), size))


def probability(score):
    return 1 / (1 + np.exp(-score))


@pytest.fixture(scope="module")
def mmoe(windows, settings):
    return build(windows, settings, calibration=Calibration(slope=0.7, offset=-0.3))


@pytest.fixture(scope="module")
def some_users(windows) -> dict[str, np.ndarray]:
    """Users at the end of their histories, users at an earlier time, unknown users."""
    users = users_at(windows, np.array([0, 7, 40, 3, 3]), np.array([24, 9, 2, 1, 0]))
    users["user_id"][1] = 0
    users["user_id"][3] = 123_456
    return users


class TestModelsAgree:
    @pytest.mark.parametrize("body", ["mmoe", "shared_bottom", "moe"])
    def test_catalogue_and_pairs(self, windows, settings, some_users, mmoe, body):
        if body == "mmoe":
            ranker = mmoe
        else:
            ranker = build(windows, replace(settings, body=body))
        scores = ranker.catalogue.predict(some_users, verbose=0)
        pairs = predict_pairs(ranker.pairs, every_pair(some_users, windows.catalogue))
        shape = (len(some_users["user_id"]), len(windows.catalogue))
        assert set(scores) == set(pairs) == set(TASKS)
        for task in TASKS:
            assert scores[task].shape == shape
            expected = keras.ops.convert_to_numpy(
                prediction(task, scores[task], ranker.calibration)
            )
            np.testing.assert_allclose(
                pairs[task].reshape(shape), expected, atol=1e-5, err_msg=task
            )
            # The predictions are not constant.
            assert np.ptp(expected, axis=0).min() > 1e-4
            assert np.ptp(expected, axis=1).min() > 1e-4

    def test_training(self, windows, some_users, mmoe):
        """The training model has the scores of the catalogue model."""
        next_movies = np.array([[5, 0], [59, 5], [1, 1], [0, 0], [2, 3]], "int32")
        scores = mmoe.catalogue.predict(some_users, verbose=0)
        found = mmoe.training.predict(
            {**some_users, "next_movies": next_movies}, verbose=0
        )
        np.testing.assert_allclose(found["watch"], scores["watch"], atol=1e-5)
        for task in ("like", "rating"):
            expected = np.take_along_axis(scores[task], next_movies, 1)[..., None]
            np.testing.assert_allclose(found[task], expected, atol=1e-5)

    def test_without_lookups(self, some_users, mmoe):
        """All layers support XLA; weights and scores are the same."""
        next_movies = np.array([[5, 0], [59, 5], [1, 1], [0, 0], [2, 3]], "int32")
        given = {**some_users, "next_movies": next_movies}
        model = mmoe.without_lookups()
        assert all(layer.supports_jit for layer in model.layers)
        assert not all(layer.supports_jit for layer in mmoe.training.layers)
        kept = {id(weight) for weight in mmoe.training.trainable_variables}
        assert {id(weight) for weight in model.trainable_variables} == kept
        looked_up = tuple(mmoe.lookups.predict(given, verbose=0))
        found = model.predict(looked_up, verbose=0)
        expected = mmoe.training.predict(given, verbose=0)
        for task in TASKS:
            np.testing.assert_allclose(found[task], expected[task], atol=1e-6)

    def test_inputs_of_the_body(self, some_users, mmoe):
        features = mmoe.user.predict(some_users, verbose=0)
        gates = keras.ops.convert_to_numpy(mmoe.body.gate_weights(features))
        assert len(features) == len(some_users["user_id"])
        np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-5)


class TestPrediction:
    def test_by_hand(self):
        calibration = Calibration(slope=2.0, offset=-3.0)
        scores = np.array([0.0, 1.5, -1.0], "float32")
        found = {
            task: keras.ops.convert_to_numpy(prediction(task, scores, calibration))
            for task in TASKS
        }
        np.testing.assert_array_equal(found["rating"], scores)
        np.testing.assert_allclose(found["like"], probability(scores), rtol=1e-6)
        expected = probability(np.array([-3.0, 0.0, -5.0]))
        np.testing.assert_allclose(found["watch"], expected, rtol=1e-6)

    def test_calibration_before_any_fit(self, windows, settings):
        # 5 of 60 are watched in training, 1 of 5 in evaluation: the odds change from
        # 5/60 to 1/4, by a factor of 3.
        ranker = build(windows, replace(settings, block=5), tasks=("watch",))
        assert ranker.calibration == pytest.approx((1.0, np.log(3)))


class TestBodies:
    def test_mmoe(self, mmoe, settings):
        assert isinstance(mmoe.body, MMoE)
        # Kernels of the experts are stacked along the first axis.
        assert mmoe.body.trainable_variables[0].shape[0] == settings.num_experts

    def test_shared_bottom(self, windows, settings):
        ranker = build(windows, replace(settings, body="shared_bottom", units=5))
        assert isinstance(ranker.body, SharedBottom)
        assert ranker.body.trainable_variables[0].shape[-1] == 5

    @pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2)])
    def test_moe(self, windows, settings, experts, top_k):
        ranker = build(windows, replace(settings, body="moe", num_experts=experts))
        assert isinstance(ranker.body, MoE)
        assert (ranker.body.num_experts, ranker.body.top_k) == (experts, top_k)
        (kernel,) = ranker.body.experts.kernels
        assert kernel.shape[-1] == settings.units
        # Relu outputs, as those of the Dense layer that it replaces.
        users = users_at(windows, np.arange(5))
        shared = ranker.body(ranker.user.predict(users, verbose=0))
        shared = keras.ops.convert_to_numpy(shared)
        assert shared.shape == (5, settings.units)
        assert (shared >= 0).all()
        assert shared.any()

    @pytest.mark.parametrize("tasks", SUBSETS, ids="+".join)
    def test_tasks(self, windows, settings, tasks):
        ranker = build(windows, settings, tasks=tasks)
        users = users_at(windows, np.array([2, 5]))
        for model in (ranker.catalogue, ranker.training, ranker.pairs):
            assert tuple(model.output) == tasks
        pairs = with_movies(users, windows.catalogue, np.array([4, 9]))
        found = predict_pairs(ranker.pairs, pairs)
        assert {name: v.shape for name, v in found.items()} == dict.fromkeys(
            tasks, (2,)
        )
        # No weights are created for other tasks.
        paths = " ".join(w.path for w in ranker.pairs.weights)
        for task in TASKS:
            assert (f"movie_bias_{task}" in paths) == (task in tasks)

    @pytest.mark.parametrize("units", [8, 64])
    def test_a_shared_bottom_of_equal_size(self, windows, settings, units):
        mine = replace(settings, units=units, num_experts=4)
        bottom = shared_bottom_of_equal_size(windows, mine)
        assert bottom == replace(mine, body="shared_bottom", units=bottom.units)
        popularity = np.ones(len(windows.catalogue))
        counts = [
            build_ranker(
                windows.catalogue, windows.train.user_ids, popularity, candidate
            ).training.count_params()
            for candidate in (mine, bottom)
        ]
        assert counts[1] == pytest.approx(counts[0], rel=0.01)


class TestUnknown:
    @pytest.fixture(scope="module")
    @classmethod
    def known(cls, windows):
        users = users_at(windows, np.array([1, 1, 1, 1]))
        return with_movies(users, windows.catalogue, np.array([1, 8, 30, 59]))

    @pytest.mark.parametrize(
        "unknown",
        [
            {"user_id": 0},
            {"user_id": 10**12},
            {"user_id": -5},
            {"movie_id": 10**12},
            {"genres": "Never Heard Of"},
            {"genres": ""},
            {"year": 0},
            {"year": 2999},
            {"last_seen": 0},
            {"history": 10**12},
            {"history": 0, "history_ratings": 0.0, "last_seen": 0},
            {"user_id": 0, "movie_id": 0, "genres": "", "year": 0},
        ],
        ids=str,
    )
    def test_predictions_are_valid(self, mmoe, known, unknown):
        altered = {
            name: np.full_like(values, unknown[name], dtype=values.dtype)
            if name != "genres"
            else np.full(values.shape, unknown[name])
            for name, values in known.items()
            if name in unknown
        }
        found = predict_pairs(mmoe.pairs, {**known, **altered})
        for task, values in found.items():
            assert np.isfinite(values).all()
            if task != "rating":
                assert ((values > 0) & (values < 1)).all()

    def test_scores_depend_on_the_history_without_an_id(self, windows, mmoe):
        users = users_at(windows, np.array([1, 2]))
        users["user_id"][:] = 0
        found = mmoe.catalogue.predict(users, verbose=0)
        for task in TASKS:
            difference = found[task][0] - found[task][1]
            # The scores differ by more than a constant.
            assert np.ptp(difference) > 0.01

    def test_all_unknown_ids_give_equal_predictions(self, mmoe, known):
        found = [
            predict_pairs(mmoe.pairs, {**known, "user_id": np.full(4, user)})
            for user in (0, 10**12, known["user_id"][0])
        ]
        for task in TASKS:
            np.testing.assert_array_equal(found[0][task], found[1][task])
            assert np.abs(found[0][task] - found[2][task]).max() > 1e-4

    def test_a_catalogue_without_genres_and_years(self, windows, settings):
        bare = Catalogue.from_movies(
            pd.DataFrame(
                {"movie_id": [1, 2, 3], "title": "", "genres": "", "year": [0, 0, 0]}
            )
        )
        ranker = build_ranker(bare, np.array([1, 2]), np.ones(3), settings)
        users = users_at(windows, np.array([0]))
        users["history"] %= 4
        scores = ranker.catalogue.predict(users, verbose=0)
        pairs = predict_pairs(ranker.pairs, every_pair(users, bare))
        np.testing.assert_allclose(pairs["rating"], scores["rating"][0], atol=1e-5)
