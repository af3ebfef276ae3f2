"""The parts of the two stages, compared with hand-worked values or NumPy."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.two_stage import pairs
from recsys_examples.two_stage.first_stage import check_candidates
from recsys_examples.two_stage.fusion import (
    Fusion,
    diverse_top,
    fuse,
    intra_list_diversity,
)
from recsys_examples.two_stage.pairs import (
    PAIR_FEATURES,
    PairFeatures,
    sums_by_search,
)
from recsys_examples.two_stage.pipeline import cut_late
from recsys_examples.two_stage.ranker import Examples, Moments
from recsys_examples.two_stage.retrieval import (
    UnseenRetrieval,
    best_scores,
    make_index,
)
from recsys_examples.two_stage.settings import Settings
from recsys_examples.two_stage.statistics import (
    Statistics,
    follow_counts,
    follow_shares,
    genre_vectors,
    similarity,
)
from recsys_examples.two_stage.towers import MASKED_SCORE


@pytest.fixture
def catalogue():
    """Five movies, ids 10 to 50; the last has no genre and no year."""
    return Catalogue(
        movie_ids=np.array([10, 20, 30, 40, 50]),
        titles=np.array(["a", "b", "c", "d", "e"]),
        genres=np.array(
            [["Drama", "War"], ["Drama", ""], ["War", ""]] + [["", ""]] * 2
        ),
        years=np.array([1990, 2000, 2010, 2000, 0]),
    )


def sequences(catalogue, *users):
    """Return sequences; each user is a list of (movie row, stars, time)."""
    ratings = [
        (user, catalogue.movie_ids[row], stars, time)
        for user, rated in enumerate(users, start=1)
        for row, stars, time in rated
    ]
    columns = ["user_id", "movie_id", "rating", "timestamp"]
    frame = pd.DataFrame(ratings, columns=columns)
    return Sequences.from_ratings(frame, catalogue, np.arange(1, len(users) + 1))


@pytest.fixture
def past(catalogue):
    return sequences(
        catalogue,
        [(0, 4.0, 1), (1, 2.0, 2), (2, 5.0, 3)],
        [(1, 3.0, 1), (0, 4.5, 1)],
        [],
    )


class TestWindows:
    def test_late_ratings_are_the_last_fifth_of_each_user(self, windows):
        train = windows.train
        early = cut_late(train, 0.2)
        for user, length in enumerate(train.lengths):
            # With two ratings or more, at least one is late and one is early.
            late = max(int(0.2 * length), 1) if length > 1 else 0
            kept = slice(early.starts[user], early.starts[user + 1])
            begin = train.starts[user]
            for name in ("movies", "ratings", "timestamps"):
                np.testing.assert_array_equal(
                    getattr(early, name)[kept],
                    getattr(train, name)[begin : begin + length - late],
                )

    def test_moments_are_the_starts_of_blocks_after_the_past(self, catalogue):
        rated = [(0, 4.0, 1), (1, 2.0, 2), (2, 5.0, 3), (3, 3.0, 4), (4, 1.0, 5)]
        until = sequences(catalogue, rated, rated[:1], [])
        before = sequences(catalogue, rated[:2], rated[:1], [])
        moments = Moments.between(before, until, block=2)
        # Two of the first user's five ratings are past: blocks of two and one.
        np.testing.assert_array_equal(moments.users, [0, 0])
        np.testing.assert_array_equal(moments.ends, [2, 4])
        np.testing.assert_array_equal(moments.movies, [[2, 3], [4, -1]])
        np.testing.assert_array_equal(moments.stars, [[5, 3], [1, 0]])

    def test_labels(self):
        moments = Moments(
            users=np.array([0]),
            ends=np.array([1]),
            movies=np.array([[7, 8, -1]]),
            stars=np.array([[4.0, 2.5, 0.0]]),
        )
        nothing = np.zeros((1, 4, 1))
        rows = np.array([[3, 7, 8, -1]])
        examples = Examples.of(moments, rows, nothing[:, 0], nothing)
        labels, weights = examples.labels, examples.weights
        # Not watched, watched and liked, watched and not liked, no candidate.
        np.testing.assert_array_equal(labels["watch"], [[0, 1, 1, -1]])
        np.testing.assert_array_equal(labels["like"][..., 0], [[0, 1, 0, 0]])
        np.testing.assert_array_equal(labels["rating"][..., 0], [[0, 4, 2.5, 0]])
        for task in ("like", "rating"):
            np.testing.assert_array_equal(weights[task], [[0, 1, 1, 0]])
        both = examples.joined(examples)
        np.testing.assert_array_equal(both.stars, np.tile(examples.stars, (2, 1)))

    @pytest.mark.parametrize("candidates", [-1, 0, 9, 61])
    def test_candidates_out_of_range(self, candidates):
        with pytest.raises(InputError, match=r"^candidates must be from 10") as caught:
            check_candidates(candidates, 60)
        assert "60 (the number of movies)" in str(caught.value)
        assert str(candidates) in str(caught.value)

    @pytest.mark.parametrize("candidates", [10, 60])
    def test_candidates_at_the_ends_of_the_range(self, candidates):
        check_candidates(candidates, 60)


class TestPairs:
    def test_follow_counts(self, catalogue, past):
        counts = follow_counts(past, len(catalogue)).toarray()
        expected = np.zeros((5, 5))
        # User 1 has 0, 1, 2 in order; with one movie between, the weight is 0.8.
        expected[0, 1], expected[1, 2], expected[0, 2] = 1, 1, 0.8
        # User 2 rated 1 and 0 in the same second: half in each direction.
        expected[1, 0] += 0.5
        expected[0, 1] += 0.5
        np.testing.assert_allclose(counts, expected)

    def test_follow_shares(self, catalogue, past):
        counts = follow_counts(past, len(catalogue)).toarray()
        expected = counts / (counts.sum(axis=1, keepdims=True) + 5)
        np.testing.assert_allclose(follow_shares(past, 5).toarray(), expected)

    def test_similarity(self, catalogue, past):
        # Movies 0 and 1 were rated by both users, movie 2 by one.
        expected = np.zeros((5, 5))
        expected[0, 1] = expected[1, 0] = 2 / 7
        expected[2, :2] = expected[:2, 2] = 1 / np.sqrt(6 * 7)
        np.testing.assert_allclose(similarity(past, 5).toarray(), expected, rtol=1e-6)

    def test_genres(self, catalogue):
        half = np.sqrt(0.5)
        expected = [[half, half], [1, 0], [0, 1], [0, 0], [0, 0]]
        np.testing.assert_allclose(genre_vectors(catalogue), expected, atol=1e-6)

    def features(self, catalogue, past, rows, scores):
        layer = PairFeatures(Statistics.of(past, catalogue, 4))
        user = past.histories(catalogue, np.arange(3))
        tensors = {name: tf.constant(values) for name, values in user.items()}
        of_user, of_pair = layer(tensors, tf.constant(rows), tf.constant(scores))
        return of_user.numpy(), of_pair.numpy()

    def test_features_of_a_pair(self, catalogue, past):
        rows = np.array([[2, 3], [0, 4], [1, 2]], np.int32)
        scores = np.array([[3, 1], [2, 2], [5, 4.5]], np.float32)
        _, pairs = self.features(catalogue, past, rows, scores)
        assert pairs.shape == (3, 2, len(PAIR_FEATURES))
        found = {name: pairs[..., i] for i, name in enumerate(PAIR_FEATURES)}
        np.testing.assert_allclose(found["score_to_best"], scores - scores[:, :1])
        np.testing.assert_allclose(found["place"], [[0, np.log(2)]] * 3, atol=1e-6)
        # The history of user 1, latest first: 2, 1, 0.
        follows = follow_shares(past, 5).toarray()[[2, 1, 0]]
        scales = {"follows_last": 10, "follows_recent": 5}
        for name, recency in (("follows_last", 3), ("follows_recent", 10)):
            expected = scales[name] * (np.exp(-np.arange(3) / recency) @ follows)
            np.testing.assert_allclose(found[name][0], expected[rows[0]], atol=1e-6)
        alike = similarity(past, 5).toarray()[[2, 1, 0]]
        liked = np.array([5, 2, 4]) - 11 / 3
        for name, weights in (("watched_with", np.ones(3)), ("rated_with", liked)):
            np.testing.assert_allclose(
                found[name][0], 0.5 * (weights @ alike)[rows[0]], atol=1e-6
            )
        genres = genre_vectors(catalogue)
        history = genres[[2, 1, 0]].sum(0)
        taste = np.array([5, 2, 4]) - 11 / 3
        taste = taste @ genres[[2, 1, 0]]
        for name, profile in (
            ("genres_of_history", history),
            ("genres_of_taste", taste),
        ):
            profile = profile / np.linalg.norm(profile)
            np.testing.assert_allclose(
                found[name][0], genres[rows[0]] @ profile, atol=1e-6
            )
        # Movies 0 and 1 were rated twice, 2 once, 3 and 4 never.
        assert found["popularity"][1, 0] == found["popularity"][2, 0]
        assert found["popularity"][0, 0] > found["popularity"][0, 1]
        # Movie 1 has a lower mean than movie 2, and is older.
        assert found["stars"][2, 0] < found["stars"][2, 1]
        assert found["year"][2, 0] < found["year"][2, 1]

    def test_an_empty_history(self, catalogue, past):
        rows = np.zeros((3, 2), np.int32)
        users, pairs = self.features(catalogue, past, rows, np.ones((3, 2), np.float32))
        np.testing.assert_array_equal(users[2], np.zeros_like(users[2]))
        np.testing.assert_array_equal(pairs[2, :, 2:8], np.zeros((2, 6)))
        assert np.isfinite(pairs).all()

    def test_movies_seen_are_those_of_the_catalogue(self, catalogue, past):
        layer = PairFeatures(Statistics.of(past, catalogue, 2))
        seen = layer.rows_seen(
            tf.constant([[50, 7, 0], [0, 0, 0], [10, 30, 0]], tf.int64)
        )
        np.testing.assert_array_equal(seen, [[0, 4], [2, 0], [2, 2]])

    def test_sums_of_candidates_without_a_table(self):
        # Candidate 5 is found twice: 1 + 4. Row 9 is no candidate, 8 is never found.
        found = tf.constant([[5, 9, 2, 5], [0, 0, 7, 9]])
        rows = tf.constant([[5, 8, 2], [9, 7, 0]])
        values = tf.constant([[1.0, 2, 3, 4], [1, 2, 3, 4]])
        once, twice = sums_by_search(found, [values, 2 * values], rows)
        np.testing.assert_array_equal(once, [[5, 0, 3], [4, 3, 3]])
        np.testing.assert_array_equal(twice, 2 * once)

    def test_a_search_gives_the_same_features(self, catalogue, past, monkeypatch):
        rows = np.array([[2, 3], [0, 4], [1, 2]], np.int32)
        scores = np.ones((3, 2), np.float32)
        _, table = self.features(catalogue, past, rows, scores)
        monkeypatch.setattr(pairs, "_is_sparse", lambda *_: True)
        _, searched = self.features(catalogue, past, rows, scores)
        np.testing.assert_allclose(searched, table, rtol=1e-6)


class TestRetrieval:
    def test_groups_contain_the_best_scores(self):
        rng = np.random.default_rng(4)
        # 160 groups of 16 and a rest of 5: from 256 * 10 scores they are grouped.
        scores = rng.permutation(3 * 2565).reshape(3, 2565).astype(np.float32)
        scores[0, -5:] += 1e4  # the best are in the rest
        scores[1, 32:48] += 1e4  # and in one group
        best, places = best_scores(tf.constant(scores), 10)
        expected = np.argsort(-scores, axis=1)[:, :10]
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, 1))

    def test_new_vectors(self):
        layer = UnseenRetrieval(np.eye(3, dtype=np.float32), k=1)
        layer.update_candidates(np.eye(3, dtype=np.float32)[[1, 0, 2]])
        nothing = tf.zeros((0, 2), tf.int64)
        _, rows = layer((tf.constant([[1.0, 0, 0]]), nothing))
        np.testing.assert_array_equal(rows, [[1]])

    def test_best_unseen_movies(self):
        rng = np.random.default_rng(3)
        queries = rng.normal(size=(4, 6)).astype(np.float32)
        movies = rng.normal(size=(50, 6)).astype(np.float32)
        hidden = rng.random((4, 50)) < 0.5
        hidden[3] = True
        hidden[3, :2] = False
        seen = np.argwhere(hidden).astype(np.int32)
        scores, rows = UnseenRetrieval(movies, k=10)((tf.constant(queries), seen))
        expected = np.where(hidden, -np.inf, queries @ movies.T)
        for user in range(3):
            best = np.argsort(-expected[user])[:10]
            np.testing.assert_array_equal(rows[user], best)
            np.testing.assert_allclose(scores[user], expected[user, best], rtol=1e-5)
        # A user who has seen all but two movies gets two candidates.
        np.testing.assert_array_equal(
            scores[3] > MASKED_SCORE / 2, [True] * 2 + [False] * 8
        )
        assert set(rows[3, :2].numpy()) == {0, 1}

    def test_the_index_has_the_movies_with_enough_ratings(self):
        rng = np.random.default_rng(3)
        queries = rng.normal(size=(2, 4)).astype(np.float32)
        movies = rng.normal(size=(30, 4)).astype(np.float32)
        popularity = rng.integers(0, 6, 30)
        assert 10 < (popularity >= 3).sum() < 25
        settings = Settings(candidates=10)
        seen = np.array([[0, 4], [0, 5], [1, 6], [1, 7]])
        index = make_index(movies, popularity, settings)
        scores, rows = index((tf.constant(queries), tf.constant(seen)))
        expected = np.where(popularity >= 3, queries @ movies.T, -np.inf)
        expected[seen[:, 0], seen[:, 1]] = -np.inf
        best = np.argsort(-expected, axis=1)[:, :10]
        np.testing.assert_array_equal(rows, best)
        np.testing.assert_allclose(
            scores, np.take_along_axis(expected, best, 1), rtol=1e-5
        )

    def test_the_index_has_at_least_as_many_movies_as_candidates(self):
        movies = np.eye(12, dtype=np.float32)
        popularity = np.array([9, 1, 2, 0] * 3)
        index = make_index(movies, popularity, Settings(candidates=10))
        nothing = tf.zeros((0, 2), tf.int64)
        _, rows = index((tf.ones((1, 12)), nothing))
        # Two of the three movies without ratings are missing.
        assert set(range(12)) - set(rows[0].numpy()) == {7, 11}


class TestFusion:
    def test_weights(self):
        scores = {
            "watch": np.float32([[1, 2]]),
            "like": np.float32([[0, 3]]),
            "rating": np.float32([[4, 2]]),
        }
        found = fuse(scores, Fusion(like=2, rating=0.5))
        # log sigmoid(0) = -0.6931, log sigmoid(3) = -0.0486.
        np.testing.assert_allclose(found, [[1 - 1.3863 + 2, 2 - 0.0972 + 1]], atol=1e-4)

    @pytest.mark.parametrize("diversity", [0.0, 0.3, 2.0])
    @pytest.mark.parametrize("size", [12, 70])
    def test_the_list_equals_a_greedy_loop(self, diversity, size):
        rng = np.random.default_rng(5)
        fused = rng.normal(size=(6, size)).astype(np.float32)
        vectors = np.abs(rng.normal(size=(6, size, 3))).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        rows = np.arange(6 * size).reshape(6, size)
        table = tf.constant(vectors.reshape(-1, 3))
        found = diverse_top(tf.constant(fused), tf.constant(rows), table, 10, diversity)
        for user in range(6):
            # Maximal marginal relevance in loops, over the 50 best.
            left = list(np.argsort(-fused[user])[:50])
            chosen = []
            for _ in range(10):
                worth = [
                    fused[user, m]
                    - diversity
                    * max([vectors[user, m] @ vectors[user, c] for c in chosen] + [0])
                    for m in left
                ]
                chosen.append(left.pop(int(np.argmax(worth))))
            np.testing.assert_array_equal(found[user], chosen)

    def test_diversity_of_lists(self):
        half = np.sqrt(0.5)
        vectors = np.array([[1, 0], [0, 1], [half, half], [0, 0]])
        # Likeness 0, 0.7071, 0.7071: mean 0.4714.
        assert intra_list_diversity(np.array([[0, 1, 2]]), vectors) == pytest.approx(
            1 - 0.4714, abs=1e-4
        )
        # A list of two equal movies, and one whose second movie has no genre.
        lists = np.array([[0, 0], [1, 3]])
        assert intra_list_diversity(lists, vectors) == pytest.approx((0 + 1) / 2)
        assert intra_list_diversity(lists[:, :1], vectors) == 0.0


def test_a_first_stage_without_two_ratings(catalogue):
    """There are no co-occurrences, and all features are finite."""
    lonely = sequences(catalogue, [(0, 4.0, 1)], [(1, 2.0, 2)], [])
    assert follow_shares(lonely, 5).nnz == similarity(lonely, 5).nnz == 0
    without_years = replace(catalogue, years=np.zeros(5, np.int64))
    assert np.isfinite(Statistics.of(lonely, without_years, 2).movies).all()
