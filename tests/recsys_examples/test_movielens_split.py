"""The split by time: sizes, order, and independence of users."""

import numpy as np
import pandas as pd
import pytest

from recsys_examples.errors import InputError
from recsys_examples.movielens.data import load_movielens
from recsys_examples.movielens.split import Split, split_by_time

PARTS = ("train", "validation", "test")


def ratings_of(counts: dict[int, int], seed: int = 0) -> pd.DataFrame:
    """Ratings in random order, with many equal timestamps."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(np.repeat(list(counts), list(counts.values())))
    return pd.DataFrame(
        {
            "user_id": users,
            "movie_id": np.arange(len(users)),  # identifies the row
            "rating": rng.integers(1, 11, len(users)).astype("float32") / 2,
            "timestamp": rng.integers(0, 30, len(users)),
        }
    )


def of_user(parts: Split, user: int) -> dict[str, list[int]]:
    frames = {part: getattr(parts, part) for part in PARTS}
    return {
        part: frame.loc[frame["user_id"] == user, "movie_id"].to_list()
        for part, frame in frames.items()
    }


@pytest.fixture(scope="module")
def ratings() -> pd.DataFrame:
    return ratings_of({user: 1 + 7 * user % 64 for user in range(1, 60)})


@pytest.fixture(scope="module")
def parts(ratings) -> Split:
    return split_by_time(ratings)


class TestByHand:
    def test_one_user(self):
        # Sorted by time, with ties in their order: d b e | a | c.
        times = {"a": 30, "b": 10, "c": 40, "d": 5, "e": 10}
        frame = pd.DataFrame(
            {"user_id": 9, "movie_id": list(times), "timestamp": times.values()}
        )
        assert of_user(split_by_time(frame), 9) == {
            "train": ["d", "b", "e"],
            "validation": ["a"],
            "test": ["c"],
        }

    @pytest.mark.parametrize(
        ("count", "train", "held_out"),
        [
            (1, 1, 0),
            (2, 2, 0),
            (3, 1, 1),
            (9, 7, 1),
            (10, 8, 1),
            (19, 17, 1),
            (20, 16, 2),  # floor(2.0)
            (29, 25, 2),
            (30, 24, 3),
            (1234, 988, 123),  # floor(123.4)
        ],
    )
    def test_sizes(self, count, train, held_out):
        parts = split_by_time(ratings_of({1: count, 2: 3}))
        sizes = [len(rows) for rows in of_user(parts, 1).values()]
        assert sizes == [train, held_out, held_out]

    def test_ties_keep_the_order_of_the_rows(self):
        frame = pd.DataFrame({"user_id": 1, "movie_id": range(100), "timestamp": 5})
        assert of_user(split_by_time(frame), 1) == {
            "train": list(range(80)),
            "validation": list(range(80, 90)),
            "test": list(range(90, 100)),
        }


class TestDefaultData:
    def test_counts(self):
        parts = split_by_time(load_movielens().ratings)
        assert len(parts.train) == 80_560
        assert len(parts.validation) == 9_722
        assert len(parts.test) == 9_722

    def test_users_with_a_liked_movie_in_the_test(self):
        test = split_by_time(load_movielens().ratings).test
        assert test.loc[test["rating"] >= 4, "user_id"].nunique() == 624


class TestProperties:
    def test_every_row_once_with_its_columns_and_types(self, ratings, parts):
        together = pd.concat([parts.train, parts.validation, parts.test])
        together = together.sort_values("movie_id", ignore_index=True)
        pd.testing.assert_frame_equal(together, ratings)

    @pytest.mark.parametrize("part", [*PARTS, "before_test"])
    def test_sorted_by_user_time_and_row(self, parts, part):
        frame = getattr(parts, part)
        keys = ["user_id", "timestamp", "movie_id"]
        pd.testing.assert_frame_equal(frame, frame.sort_values(keys, ignore_index=True))

    def test_no_rating_is_later_than_one_of_a_later_part(self, parts):
        last, first = (
            {p: getattr(parts, p).groupby("user_id")["timestamp"].agg(f) for p in PARTS}
            for f in ("max", "min")
        )
        for earlier, later in [("train", "validation"), ("validation", "test")]:
            users = last[later].index
            assert len(users) > 50
            assert (last[earlier][users] <= first[later][users]).all()

    def test_before_test_is_train_and_validation(self, parts):
        expected = pd.concat([parts.train, parts.validation])
        expected = expected.sort_values(
            ["user_id", "timestamp", "movie_id"], ignore_index=True
        )
        pd.testing.assert_frame_equal(parts.before_test, expected)

    def test_order_of_the_users_rows_does_not_matter(self, ratings, parts):
        by_user = [rows for _, rows in ratings.groupby("user_id")]
        np.random.default_rng(1).shuffle(by_user)
        again = split_by_time(pd.concat(by_user))
        for part in PARTS:
            pd.testing.assert_frame_equal(getattr(again, part), getattr(parts, part))

    def test_shuffled_rows_without_ties_give_the_same_split(self, ratings):
        distinct = ratings.assign(timestamp=ratings["movie_id"])
        parts = split_by_time(distinct)
        again = split_by_time(distinct.sample(frac=1, random_state=1))
        for part in PARTS:
            pd.testing.assert_frame_equal(getattr(again, part), getattr(parts, part))

    def test_later_ratings_of_one_user_do_not_change_the_others(self, ratings, parts):
        more = ratings_of({5: 40}).assign(timestamp=100)
        again = split_by_time(pd.concat([ratings, more]))
        assert of_user(again, 5) != of_user(parts, 5)
        for user in set(ratings["user_id"]) - {5}:
            assert of_user(again, user) == of_user(parts, user)

    def test_the_given_ratings_are_not_changed(self, ratings):
        before = ratings.copy()
        split_by_time(ratings)
        pd.testing.assert_frame_equal(ratings, before)


@pytest.mark.parametrize("counts", [{}, {1: 1}, {1: 2, 2: 1, 3: 2}])
def test_nothing_to_hold_out(counts):
    most = max(counts.values(), default=0)
    with pytest.raises(
        InputError, match=rf"at least 3 ratings; .* number per user is {most}$"
    ):
        split_by_time(ratings_of(counts))
