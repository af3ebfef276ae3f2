"""The order within users: warnings, and hand-worked values of the statistics."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recsys_examples.movielens import order
from recsys_examples.movielens.data import first_users, load_movielens
from recsys_examples.movielens.order import measure_order, order_warnings

SAME_TIME = "have the same timestamp and are in the order of the file"
SAME_ORDER = "movies are in a similar order for all users"


def by_movie(ratings):
    return ratings.assign(timestamp=ratings["movie_id"])


def by_movie_backwards(ratings):
    return ratings.assign(timestamp=10**6 - ratings["movie_id"])


def by_popularity(ratings):
    counts = ratings["movie_id"].map(ratings["movie_id"].value_counts())
    return ratings.assign(timestamp=10**6 - counts)


def by_row(ratings):
    """The file is sorted by movie id within each user."""
    return ratings.assign(timestamp=np.arange(len(ratings)))


def one_time(ratings):
    return ratings.assign(timestamp=978_300_760)


def one_time_in_random_rows(ratings):
    return one_time(ratings).sample(frac=1, random_state=0)


def hours(ratings):
    return ratings.assign(timestamp=ratings["timestamp"] // 3600)


def by_stars(ratings):
    return ratings.assign(timestamp=(2 * ratings["rating"]).astype(int))


def as_it_is(ratings):
    return ratings


def random(ratings):
    times = np.random.default_rng(0).permutation(len(ratings))
    return ratings.assign(timestamp=times)


def random_rows(ratings):
    return ratings.sample(frac=1, random_state=0)


@pytest.fixture(scope="module", params=["all", "first 150 users"])
def ratings(request) -> pd.DataFrame:
    data = load_movielens()
    return (data if request.param == "all" else first_users(data, 150)).ratings


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (by_movie, {SAME_ORDER}),
        (by_movie_backwards, {SAME_ORDER}),
        (by_popularity, {SAME_ORDER}),
        (by_row, {SAME_ORDER}),
        (one_time, {SAME_TIME, SAME_ORDER}),
        (one_time_in_random_rows, {SAME_TIME}),
        (hours, {SAME_TIME}),
        (as_it_is, set()),
        (random, set()),
        (random_rows, set()),
    ],
)
def test_the_default_data(ratings, change, reasons):
    found = order_warnings(change(ratings))
    assert len(found) == (1 if reasons else 0)
    for warning in found:
        assert {reason for reason in (SAME_TIME, SAME_ORDER) if reason in warning} == (
            reasons
        )
        assert warning.endswith("their ranking metrics are meaningless for real use.")
        assert "\n" not in warning


@pytest.mark.parametrize(
    ("change", "tied", "agreement"),
    [
        (as_it_is, 0.02, 0.21),
        (random, 0.00, 0.00),
        (by_movie, 0.00, 0.90),
        (by_popularity, 0.01, 0.98),
        (one_time, 1.00, 0.90),
        (one_time_in_random_rows, 1.00, 0.00),
        (hours, 0.64, 0.53),
        (by_stars, 0.26, 0.37),
    ],
)
def test_the_table_in_the_docstring(change, tied, agreement):
    found = measure_order(change(load_movielens().ratings))
    assert found.tied == pytest.approx(tied, abs=0.0051)
    assert found.agreement == pytest.approx(agreement, abs=0.0051)


def frame(*rows):
    return pd.DataFrame(rows, columns=["user_id", "movie_id", "timestamp"])


class TestByHand:
    def test_tied(self):
        # User 1: one of 3 pairs is tied; user 2: one of one; user 3 has no pair.
        ratings = frame(
            (1, 5, 9), (1, 6, 9), (1, 7, 8), (2, 5, 3), (2, 6, 3), (3, 5, 1)
        )
        assert measure_order(ratings).tied == pytest.approx((1 / 3 + 1) / 2)

    def test_agreement_against_loops(self):
        rng = np.random.default_rng(3)
        ratings = frame(
            *((u, m, rng.random()) for u in range(30) for m in rng.permutation(25)[:u])
        )
        places = {
            user: {
                movie: (at + 0.5) / len(rows)
                for at, movie in enumerate(rows.sort_values("timestamp")["movie_id"])
            }
            for user, rows in ratings.groupby("user_id")
        }
        expected = []
        for user, own in places.items():
            pairs = []
            for movie, place in own.items():
                others = [
                    p[movie] for u, p in places.items() if u != user and movie in p
                ]
                if others:
                    pairs.append((place, np.mean(others)))
            if len(pairs) >= 5:
                expected.append(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
        found = measure_order(ratings).agreement
        assert found == pytest.approx(np.mean(expected), abs=1e-9)

    @pytest.mark.parametrize("users", [9, 10])
    def test_few_users_give_no_agreement(self, users):
        ratings = frame(*((u, m, m) for u in range(users) for m in range(6)))
        found = measure_order(ratings)
        if users < 10:
            assert math.isnan(found.agreement)
            assert order_warnings(ratings) == []
        else:
            assert found.agreement == pytest.approx(1)
            assert len(order_warnings(ratings)) == 1

    def test_nothing_to_compare(self):
        found = measure_order(frame((1, 5, 1), (2, 6, 1)))
        assert math.isnan(found.tied)
        assert math.isnan(found.agreement)


def test_a_sample_of_users_gives_the_same_warnings(monkeypatch):
    monkeypatch.setattr(order, "_MAX_USERS", 200)
    ratings = load_movielens().ratings
    assert order._sample_users(ratings)["user_id"].nunique() == 200
    assert order_warnings(ratings) == []
    assert len(order_warnings(by_movie(ratings))) == 1
    assert len(order_warnings(one_time_in_random_rows(ratings))) == 1
