"""Features: hand-worked values, and no leakage from later ratings."""

from dataclasses import fields, replace

import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys_examples.movielens.features import HISTORY_LENGTH, Catalogue, Sequences
from recsys_examples.movielens.labels import Examples
from recsys_examples.movielens.model import build_ranker
from recsys_examples.movielens.pipeline import make_windows
from recsys_examples.movielens.training import Validation, fit_ranker

# Rows 0 to 3 of the catalogue; the data frame is not sorted.
CATALOGUE = Catalogue.from_movies(
    pd.DataFrame(
        {
            "movie_id": [40, 10, 30, 20],
            "title": ["Forty", "Ten", "Thirty", "Twenty"],
            "genres": ["War", "Comedy|Drama|War", "", "Drama"],
            "year": [1994, 1991, 0, 1992],
        }
    )
)
NEW_YEAR_2000 = 946_684_800
# User 5: movies 20, 40, 10; user 6: none; user 9: movie 30.
SEQUENCES = Sequences.from_ratings(
    pd.DataFrame(
        {
            "user_id": [5, 5, 5, 9],
            "movie_id": [20, 40, 10, 30],
            "rating": [3.0, 4.5, 0.5, 5.0],
            "timestamp": [0, NEW_YEAR_2000 - 1, NEW_YEAR_2000, 31_536_000],
        }
    ),
    CATALOGUE,
    user_ids=np.array([5, 6, 9]),
)


def padded(*values: float) -> list[float]:
    return [*values, *[0] * (HISTORY_LENGTH - len(values))]


def histories(users: list[int], ends: list[int] | None = None) -> dict:
    at = None if ends is None else np.array(ends)
    found = SEQUENCES.histories(CATALOGUE, np.array(users), at)
    return {name: values.tolist() for name, values in found.items()}


class TestCatalogue:
    def test_rows_in_the_order_of_the_ids(self):
        assert CATALOGUE.movie_ids.tolist() == [10, 20, 30, 40]
        assert CATALOGUE.titles.tolist() == ["Ten", "Twenty", "Thirty", "Forty"]
        assert CATALOGUE.years.tolist() == [1991, 1992, 0, 1994]
        assert len(CATALOGUE) == 4

    def test_genres_are_padded_to_the_largest_number(self):
        assert CATALOGUE.genres.tolist() == [
            ["Comedy", "Drama", "War"],
            ["Drama", "", ""],
            ["", "", ""],
            ["War", "", ""],
        ]

    def test_rows_of_ids(self):
        assert CATALOGUE.rows_of(np.array([40, 10, 40])).tolist() == [3, 0, 3]


class TestSequences:
    def test_layout(self):
        assert SEQUENCES.starts.tolist() == [0, 3, 3, 4]
        assert SEQUENCES.lengths.tolist() == [3, 0, 1]
        assert SEQUENCES.users.tolist() == [0, 0, 0, 2]
        assert SEQUENCES.movies.tolist() == [1, 3, 0, 2]

    def test_matrix(self):
        assert SEQUENCES.matrix(4).toarray().tolist() == [
            [1, 1, 0, 1],
            [0, 0, 0, 0],
            [0, 0, 1, 0],
        ]


class TestHistories:
    def test_latest_first_then_padding(self):
        assert histories([0, 2]) == {
            "user_id": [5, 9],
            "history": [padded(10, 40, 20), padded(30)],
            "history_ratings": [padded(0.5, 4.5, 3.0), padded(5.0)],
            "last_seen": [2000, 1971],
        }

    def test_an_earlier_time(self):
        # The second rating of user 5 is in the last second of 1999.
        assert histories([0, 0], [2, 1]) == {
            "user_id": [5, 5],
            "history": [padded(40, 20), padded(20)],
            "history_ratings": [padded(4.5, 3.0), padded(3.0)],
            "last_seen": [1999, 1970],
        }

    @pytest.mark.parametrize(("user", "ends"), [(1, None), (1, [0]), (0, [0])])
    def test_empty_history(self, user, ends):
        found = histories([user], ends)
        assert found.pop("user_id") == [SEQUENCES.user_ids[user]]
        assert found == {
            "history": [padded()],
            "history_ratings": [padded()],
            "last_seen": [0],
        }

    def test_last_user_without_ratings(self):
        # The start of its ratings is the end of the arrays.
        last = replace(SEQUENCES, user_ids=np.array([5, 9, 11]))
        last = replace(last, starts=np.array([0, 3, 4, 4]))
        found = last.histories(CATALOGUE, np.array([2]))
        assert found["history"].tolist() == [padded()]
        assert found["last_seen"].tolist() == [0]

    def test_no_ratings_at_all(self):
        none = Sequences.from_ratings(
            pd.DataFrame(columns=["user_id", "movie_id", "rating", "timestamp"]).astype(
                {"user_id": int, "movie_id": int, "rating": float, "timestamp": int}
            ),
            CATALOGUE,
            np.array([5, 6]),
        )
        found = none.histories(CATALOGUE, np.array([1, 0]))
        assert found["user_id"].tolist() == [6, 5]
        assert found["history"].tolist() == [padded(), padded()]
        assert found["history_ratings"].tolist() == [padded(), padded()]
        assert found["last_seen"].tolist() == [0, 0]

    def test_types_and_shapes(self):
        found = SEQUENCES.histories(CATALOGUE, np.array([0, 1, 2]))
        assert {name: (v.dtype.name, v.shape) for name, v in found.items()} == {
            "user_id": ("int64", (3,)),
            "history": ("int64", (3, HISTORY_LENGTH)),
            "history_ratings": ("float32", (3, HISTORY_LENGTH)),
            "last_seen": ("int64", (3,)),
        }

    def test_only_the_latest_are_kept(self):
        count = HISTORY_LENGTH + 3
        frame = pd.DataFrame(
            {
                "user_id": 1,
                "movie_id": [10, 20, 30, *[40] * HISTORY_LENGTH],
                "rating": np.arange(count) % 10 / 2 + 0.5,
                "timestamp": range(count),
            }
        )
        long = Sequences.from_ratings(frame, CATALOGUE, np.array([1]))
        found = long.histories(CATALOGUE, np.array([0, 0]), np.array([count, 51]))
        assert found["history"].tolist() == [
            [40] * HISTORY_LENGTH,
            [40] * 48 + [30, 20],
        ]
        latest_first = frame["rating"].to_numpy()[::-1]
        np.testing.assert_array_equal(
            found["history_ratings"], [latest_first[:50], latest_first[2:52]]
        )


class TestEarlierTimes:
    """A history contains all earlier ratings, and no later ones."""

    @hypothesis_settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_later_ratings_change_nothing(self, windows, data):
        sequences, catalogue = windows.before_test, windows.catalogue
        user = data.draw(st.integers(0, len(sequences.user_ids) - 1))
        end = data.draw(st.integers(0, int(sequences.lengths[user])))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        later = np.arange(sequences.starts[user] + end, sequences.starts[user + 1])
        altered = _with_other_ratings(sequences, later, len(catalogue), rng)

        found = altered.histories(catalogue, np.array([user]), np.array([end]))
        expected = _history_in_a_loop(sequences, catalogue, user, end)
        for name, values in found.items():
            np.testing.assert_array_equal(values[0], expected[name], err_msg=name)


def _with_other_ratings(
    sequences: Sequences, at: np.ndarray, num_movies: int, rng: np.random.Generator
) -> Sequences:
    movies, ratings, times = (
        values.copy()
        for values in (sequences.movies, sequences.ratings, sequences.timestamps)
    )
    movies[at] = rng.integers(0, num_movies, len(at))
    ratings[at] = rng.integers(1, 11, len(at)) / 2
    times[at] += 10**8
    return replace(sequences, movies=movies, ratings=ratings, timestamps=times)


def _history_in_a_loop(
    sequences: Sequences, catalogue: Catalogue, user: int, end: int
) -> dict:
    first = sequences.starts[user]
    happened = range(first, first + end)
    latest = list(reversed(happened))[:HISTORY_LENGTH]
    movie_ids = [catalogue.movie_ids[sequences.movies[i]] for i in latest]
    year = pd.Timestamp(sequences.timestamps[latest[0]], unit="s").year if end else 0
    return {
        "user_id": sequences.user_ids[user],
        "history": padded(*movie_ids),
        "history_ratings": padded(*(sequences.ratings[i] for i in latest)),
        "last_seen": year,
    }


# Changes of the ratings after the training window that do not move its end: the window
# has n - 2 floor(n / 10) of n ratings. It is the same with two more ratings if n ends
# in 8 or 9, and with two fewer if n ends in 0 or 1.


def _changed(ratings: pd.DataFrame) -> pd.DataFrame:
    """Other movies, stars and times in both later windows of every user."""
    frames = []
    for user, rows in ratings.sort_values("timestamp").groupby("user_id"):
        held_out = 2 * (len(rows) // 10) if len(rows) >= 3 else 0
        train, later = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
        unrated = np.setdiff1d(ratings["movie_id"].unique(), rows["movie_id"])
        later = later.assign(
            movie_id=unrated[:held_out],
            rating=np.float32(5.5) - later["rating"],
            timestamp=later["timestamp"] + 10**8 + user,
        )
        frames += [train, later]
    return pd.concat(frames, ignore_index=True)


def _with_two_more(ratings: pd.DataFrame) -> pd.DataFrame:
    frames = [ratings]
    for user, rows in ratings.groupby("user_id"):
        if len(rows) % 10 in (8, 9):
            unrated = np.setdiff1d(ratings["movie_id"].unique(), rows["movie_id"])
            last = rows["timestamp"].max()
            frames.append(
                pd.DataFrame(
                    {
                        "user_id": user,
                        "movie_id": unrated[:2],
                        "rating": np.array([5, 0.5], "float32"),
                        "timestamp": [last + 1, last + 10**8],
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def _with_two_fewer(ratings: pd.DataFrame) -> pd.DataFrame:
    ratings = ratings.sort_values(["user_id", "timestamp"], ignore_index=True)
    by_user = ratings.groupby("user_id")
    count = by_user["movie_id"].transform("size")
    from_end = by_user.cumcount(ascending=False)
    gone = count.mod(10).isin([0, 1]) & (count >= 20) & (from_end < 2)
    return ratings[~gone].reset_index(drop=True)


ALTERATIONS = {
    "changed": _changed,
    "two more": _with_two_more,
    "two fewer": _with_two_fewer,
}


@pytest.fixture(scope="module", params=ALTERATIONS)
def altered(request, movielens):
    """The windows of the same data, with changed ratings after the training window."""
    ratings = ALTERATIONS[request.param](movielens.ratings)
    return make_windows(replace(movielens, ratings=ratings))


class TestNoLeak:
    """Training does not depend on the ratings of the validation and test windows."""

    def test_the_later_windows_differ(self, windows, altered):
        assert altered.before_test.movies.tobytes() != (
            windows.before_test.movies.tobytes()
        )
        assert altered.test.movies.tobytes() != windows.test.movies.tobytes()
        differ = altered.validation_task.relevant != windows.validation_task.relevant
        assert differ.nnz > 0

    def test_catalogue_and_training_window(self, windows, altered):
        for part in ("train", "catalogue"):
            expected = getattr(windows, part)
            for field in fields(expected):
                values = getattr(expected, field.name)
                again = getattr(getattr(altered, part), field.name)
                assert again.tobytes() == values.tobytes(), (part, field.name)
        assert (windows.validation_task.seen != altered.validation_task.seen).nnz == 0

    def test_training_examples(self, windows, altered, settings):
        mine = Examples(windows.train, windows.catalogue, settings)
        others = Examples(altered.train, altered.catalogue, settings)
        for _ in range(2):  # epochs
            assert len(others) == len(mine) > 5
            for batch in range(len(mine)):
                for values, again in zip(mine[batch], others[batch], strict=True):
                    assert set(values) == set(again)
                    for name in values:
                        assert again[name].tobytes() == values[name].tobytes(), name
            mine.on_epoch_end()
            others.on_epoch_end()

    def test_trained_weights(self, windows, movielens, settings):
        """One epoch with another validation window gives bitwise equal weights."""
        altered = make_windows(replace(movielens, ratings=_changed(movielens.ratings)))
        mine, others = (
            fit_ranker(
                w.train,
                w.catalogue,
                settings,
                validation=Validation(w.before_test, w.validation_task),
                epochs=1,
                verbose=0,
            )
            for w in (windows, altered)
        )
        weights = [fit.ranker.training.get_weights() for fit in (mine, others)]
        for values, again in zip(*weights, strict=True):
            assert again.tobytes() == values.tobytes()
        for name in ("loss", "watch_loss", "like_auc", "rating_rmse"):
            assert others.curves[name] == mine.curves[name]
        assert others.curves["val_loss"] != mine.curves["val_loss"]

    def test_biases_of_movies_are_the_log_of_their_training_counts(
        self, windows, settings
    ):
        train, catalogue = windows.train, windows.catalogue
        popularity = np.bincount(train.movies, minlength=len(catalogue))
        ranker = build_ranker(catalogue, train.user_ids, popularity, settings)
        weights = {w.path: keras.ops.convert_to_numpy(w) for w in ranker.pairs.weights}
        (bias,) = (w for path, w in weights.items() if "movie_bias_watch" in path)
        counts = [np.sum(train.movies == row) for row in range(len(catalogue))]
        assert min(counts) < max(counts)
        np.testing.assert_allclose(
            bias[2:, 0], np.log(np.array(counts) + 0.5) - 6, rtol=1e-6
        )
