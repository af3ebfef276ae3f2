"""Ranking metrics, compared with hand-worked values and loops; the baselines."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from recsys_examples.movielens import baselines
from recsys_examples.movielens.data import load_movielens
from recsys_examples.movielens.evaluation import (
    Rows,
    calibrate,
    measure,
    raw_pairs,
    sample_rows,
)
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import Calibration
from recsys_examples.movielens.pipeline import make_windows
from recsys_examples.movielens.ranking import (
    RankingTask,
    group_auc,
    rank,
    top_movies,
)


def matrix(rows) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.array(rows, "float32"))


class TestRankByHand:
    # Three users, five movies. User 1 has nothing relevant and is left out.
    TASK = RankingTask(
        seen=matrix([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]),
        relevant=matrix([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]),
    )
    # Without seen movies, user 0 gets movies 4 3 2 1 and user 2 gets 1 0 2.
    SCORES = np.array([[9.0, 1, 2, 3, 4], [0, 0, 0, 0, 9], [2, 3, -1, 8, 9]], "float32")

    def found(self, k):
        return rank(lambda users: self.SCORES[users], self.TASK, k=k)

    def test_users(self):
        assert self.TASK.users.tolist() == [0, 2]

    def test_two(self):
        # User 0: movie 4 is a hit at rank 1, with gain 1/log2(2) = 1; the ideal is
        #         1 + 1/log2(3).
        # User 2: movie 0 is a hit at rank 2, with gain 1/log2(3); the ideal is 1.
        discount = 1 / np.log2(3)
        assert self.found(2) == pytest.approx(
            {
                "ndcg@2": (1 / (1 + discount) + discount) / 2,
                "recall@2": (1 / 2 + 1) / 2,
                "coverage@2": 4 / 5,  # movies 4 3 and 1 0
            }
        )

    def test_three(self):
        # User 0 as before: its second relevant movie is at rank 4. User 2: [1 0 2].
        discount = 1 / np.log2(3)
        assert self.found(3) == pytest.approx(
            {
                "ndcg@3": (1 / (1 + discount) + discount) / 2,
                "recall@3": (1 / 2 + 1) / 2,
                "coverage@3": 5 / 5,  # 4 3 2 and 1 0 2
            }
        )

    def test_from_window(self):
        catalogue = Catalogue.from_movies(
            pd.DataFrame({"movie_id": [3, 5, 8], "title": "", "genres": "", "year": 0})
        )

        def ratings(*rows):
            names = ["user_id", "movie_id", "rating", "timestamp"]
            return pd.DataFrame(rows, columns=names)

        before = Sequences.from_ratings(
            ratings((1, 3, 0.5, 0), (4, 8, 5.0, 0)), catalogue, np.array([1, 2, 4])
        )
        window = ratings((1, 5, 4.0, 1), (1, 8, 3.5, 2), (4, 3, 1.0, 1))
        task = RankingTask.from_window(before, window, catalogue)
        # All rated movies are seen; those with 4 stars or more are relevant.
        assert task.seen.toarray().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
        assert task.relevant.toarray().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
        assert task.users.tolist() == [0]


def rank_in_a_loop(scores, task, k):
    """All metrics by their definition, in loops over users and ranks."""
    seen, relevant = task.seen.toarray(), task.relevant.toarray()
    ndcg, recall, listed = [], [], set()
    for user in range(len(scores)):
        if not relevant[user].any():
            continue
        candidates = [i for i in range(scores.shape[1]) if not seen[user, i]]
        best = sorted(candidates, key=lambda i: -scores[user, i])[:k]
        hits = [relevant[user, i] for i in best]
        many = int(relevant[user].sum())
        gain = sum(hit / np.log2(place + 2) for place, hit in enumerate(hits))
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, many)))
        ndcg.append(gain / ideal)
        recall.append(sum(hits) / many)
        listed.update(best)
    return {
        f"ndcg@{k}": np.mean(ndcg),
        f"recall@{k}": np.mean(recall),
        f"coverage@{k}": len(listed) / scores.shape[1],
    }


class TestRankAgainstALoop:
    @pytest.mark.parametrize("k", [1, 3, 10])
    @pytest.mark.parametrize("batch_size", [7, 256])
    def test_random(self, k, batch_size):
        rng = np.random.default_rng(k)
        states = rng.choice(3, (30, 40), p=[0.7, 0.2, 0.1])
        states[:3] = 0  # users without a relevant movie
        states[3, :25] = 2  # a user with many more than k relevant movies
        task = RankingTask(matrix(states == 1), matrix(states == 2))
        scores = rng.normal(size=states.shape).astype("float32")
        scores[4] = 1e30 * (scores[4] - 9)  # very low, but above those of seen movies
        found = rank(lambda users: scores[users], task, k, batch_size)
        assert found == pytest.approx(rank_in_a_loop(scores, task, k), rel=1e-6)

    def test_fewer_candidates_than_places(self):
        """Lists are not filled with seen movies."""
        rng = np.random.default_rng(0)
        states = np.ones((5, 40))
        states[:, 3] = 2  # all seen except movie 3, which is relevant, and movie 7
        states[:, 7] = 0
        task = RankingTask(matrix(states == 1), matrix(states == 2))
        scores = rng.normal(size=states.shape).astype("float32")
        found = rank(lambda users: scores[users], task, 10)
        assert found == pytest.approx(rank_in_a_loop(scores, task, 10), rel=1e-6)

    def test_a_catalogue_of_fewer_movies_than_places(self):
        states = np.array([[0, 2, 1, 0], [2, 0, 0, 0]])
        task = RankingTask(matrix(states == 1), matrix(states == 2))
        scores = np.arange(8, dtype="float32").reshape(2, 4)
        found = rank(lambda users: scores[users], task, 10)
        assert found == pytest.approx(rank_in_a_loop(scores, task, 10), rel=1e-6)


def test_top_movies_best_first():
    scores = np.array([[1.0, 9, 3, 7], [4, 3, 2, 1]])
    assert top_movies(scores, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert top_movies(scores, 4).tolist() == [[1, 3, 2, 0], [0, 1, 2, 3]]


class TestGroupAuc:
    def test_by_hand(self):
        # User 1: labels 1 0 0, scores 2 1 3: one of two pairs in order, AUC 1/2.
        # User 2: labels 1 0, AUC 1. User 3 has only positives and is excluded.
        found = group_auc(
            np.array([1, 2, 1, 3, 2, 1]),
            np.array([1, 1, 0, 1, 0, 0]),
            np.array([2.0, 5, 1, 7, 4, 3]),
        )
        assert found == pytest.approx((3 * 0.5 + 2 * 1) / 5)

    def test_ties_are_half(self):
        found = group_auc(np.array([1, 1]), np.array([0, 1]), np.array([0.5, 0.5]))
        assert found == 0.5

    def test_no_user_has_both_labels(self):
        found = group_auc(np.array([1, 2]), np.array([0, 1]), np.array([0.1, 0.9]))
        assert np.isnan(found)


class TestRows:
    @pytest.fixture(scope="module")
    @classmethod
    def rated(cls, windows):
        size = len(windows.catalogue)
        return windows.before_test.matrix(size) + windows.test.matrix(size)

    @pytest.fixture(scope="module")
    @classmethod
    def rows(cls, windows, rated):
        return sample_rows(windows.test, rated, len(windows.catalogue))

    def test_the_window_and_unseen_movies(self, windows, rated, rows):
        watched = rows.watched
        np.testing.assert_array_equal(rows.users[watched], windows.test.users)
        np.testing.assert_array_equal(rows.movies[watched], windows.test.movies)
        np.testing.assert_array_equal(rows.ratings[watched], windows.test.ratings)
        assert (rows.ratings[~watched] == 0).all()
        unseen = np.asarray(rated[rows.users[~watched], rows.movies[~watched]]).ravel()
        assert (unseen == 0).all()
        assert 0 < (~watched).sum() <= 4 * watched.sum()
        assert set(rows.users[~watched]) <= set(windows.test.users)

    def test_seeded(self, windows, rated, rows):
        again, other = (
            sample_rows(windows.test, rated, len(windows.catalogue), seed)
            for seed in (0, 1)
        )
        np.testing.assert_array_equal(again.movies, rows.movies)
        assert other.movies.tolist() != rows.movies.tolist()

    def test_raw_features(self, windows, rows):
        found = raw_pairs(rows, windows.before_test, windows.catalogue)
        assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
            (
                "user_id",
                "history",
                "history_ratings",
                "last_seen",
                "movie_id",
                "genres",
                "year",
            ),
            len(rows.users),
        )
        movie = rows.movies[5]
        assert found["movie_id"][5] == windows.catalogue.movie_ids[movie]
        assert found["year"][5] == windows.catalogue.years[movie]
        assert found["genres"][5].tolist() == windows.catalogue.genres[movie].tolist()

    def test_measure_by_hand(self):
        rows = Rows(
            users=np.array([0, 0, 1, 0, 1]),
            movies=np.arange(5),
            watched=np.array([True, True, True, False, False]),
            ratings=np.array([4.0, 2.0, 5.0, 0.0, 0.0], "float32"),
        )
        found = measure(
            rows,
            {
                "watch": np.array([0.5, 0.75, 0.75, 0.6, 0.25]),
                "like": np.array([0.5, 0.25, 0.75, 0.99, 0.99]),
                "rating": np.array([3.0, 4.0, 5.0, 100.0, -100.0]),
            },
        )
        # watch: 3 of 3 pairs with the last row are in order, 2 of 3 with the fourth:
        # 5 of 6. User 0: 1 of 2; user 1: 1 of 1; weights 3 and 2.
        # like, on the three watched: both liked rows are higher; only user 0 has both
        # classes. rating: squared errors 1, 4 and 0.
        log = np.log
        assert found == pytest.approx(
            {
                "watch_auc": 5 / 6,
                "watch_log_loss": -(log(0.5) + 3 * log(0.75) + log(0.4)) / 5,
                "watch_gauc": (3 * 0.5 + 2 * 1) / 5,
                "like_auc": 1.0,
                "like_log_loss": -(log(0.5) + log(0.75) + log(0.75)) / 3,
                "like_gauc": 1.0,
                "rating_rmse": (5 / 3) ** 0.5,
            }
        )
        assert set(measure(rows, {"rating": np.zeros(5)})) == {"rating_rmse"}

    def test_parts(self, rows):
        parts = list(rows.parts(7))
        assert {len(part.users) for part in parts[:-1]} == {7}
        for name in ("users", "movies", "watched", "ratings"):
            together = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(together, getattr(rows, name))

    def test_calibration_recovers_the_line(self):
        """The true log odds are 0.5 s - 1 for a score s, and predicted as 2 s + 3."""
        rng = np.random.default_rng(0)
        score = rng.normal(size=50_000)
        true = 1 / (1 + np.exp(1 - 0.5 * score))
        rows = Rows(
            users=np.zeros(len(score), int),
            movies=np.zeros(len(score), int),
            watched=rng.random(len(score)) < true,
            ratings=np.zeros(len(score)),
        )
        predicted = {"watch": 1 / (1 + np.exp(-(2 * score + 3)))}
        found = calibrate(rows, predicted, Calibration(slope=2, offset=3))
        # The standard errors are 0.01.
        assert found.slope == pytest.approx(0.5, abs=0.04)
        assert found.offset == pytest.approx(-1, abs=0.04)

    def test_undefined_metrics_are_omitted(self):
        """The AUC is undefined for a single class, overall and within a user."""
        rows = Rows(
            users=np.array([0, 1, 0, 1]),
            movies=np.arange(4),
            watched=np.array([True, True, False, False]),
            ratings=np.array([4.0, 5.0, 0.0, 0.0], "float32"),
        )
        predictions = {
            "watch": np.array([0.5, 0.5, 0.1, 0.6]),
            "like": np.array([0.5, 0.25, 0.1, 0.1]),
            "rating": np.array([4.0, 5.0, 0.0, 0.0]),
        }
        found = measure(rows, predictions)
        watch = {"watch_auc", "watch_log_loss", "watch_gauc"}
        assert set(found) == {*watch, "rating_rmse"}
        ratings = np.array([4.0, 3.0, 0.0, 0.0], "float32")
        found = measure(replace(rows, ratings=ratings), predictions)
        assert set(found) == {*watch, "like_auc", "like_log_loss", "rating_rmse"}


class TestBaselines:
    @pytest.fixture(scope="module")
    @classmethod
    def watched(cls, windows):
        return windows.before_test.matrix(len(windows.catalogue))

    def test_popularity(self, windows, watched):
        counts = np.bincount(windows.before_test.movies, minlength=watched.shape[1])
        found = baselines.popularity(watched)(np.array([3, 0]))
        assert found.tolist() == [counts.tolist()] * 2

    def test_item_knn_is_cosine(self, watched):
        users = np.array([5, 0, 39])
        dense = watched.toarray().astype("float64")
        norms = np.linalg.norm(dense, axis=0)
        cosine = dense.T @ dense / np.outer(norms, norms).clip(1e-12)
        found = baselines.item_knn(watched, neighbours=watched.shape[1])(users)
        np.testing.assert_allclose(found, dense[users] @ cosine, rtol=1e-6)

    def test_item_knn_keeps_the_nearest(self, watched):
        few = baselines.item_knn(watched, neighbours=5)(np.arange(40))
        many = baselines.item_knn(watched, neighbours=50)(np.arange(40))
        assert (few <= many + 1e-9).all()
        assert few.sum() < many.sum()

    def test_als_is_deterministic_given_the_seed(self, watched):
        settings = baselines.ALSSettings(factors=8, regularization=1.0, alpha=2)
        users = np.arange(41)
        one, same, other = (
            baselines.als(watched, settings, seed)(users) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).max() > 1e-4
        # Watched movies have higher scores.
        seen = watched.toarray() > 0
        assert one[seen].mean() > one[~seen].mean() + 0.1


class TestDefaultData:
    """The protocol on the default data."""

    def test_popularity_on_the_test_window(self):
        windows = make_windows(load_movielens())
        watched = windows.before_test.matrix(len(windows.catalogue))
        found = rank(baselines.popularity(watched), windows.test_task)
        assert len(windows.test_task.users) == 624
        assert round(found["ndcg@10"], 4) == 0.0437


def test_a_window_without_a_liked_movie(movielens):
    ratings = movielens.ratings.assign(rating=np.float32(3.5))
    with pytest.raises(ValueError, match="rated 4 or more in the validation window"):
        make_windows(replace(movielens, ratings=ratings))
