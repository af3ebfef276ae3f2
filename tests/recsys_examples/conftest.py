"""A MovieLens so small that a ranker is trained on it in seconds."""

import numpy as np
import pandas as pd
import pytest

from recsys_examples.movielens.data import MovieLens

NUM_MOVIES = 60
GENRES = np.array(["Action", "Comedy", "Drama", "War"])
NEWCOMER = 99  # a user with two ratings, who is wholly in the training window


def movies_frame(rng: np.random.Generator) -> pd.DataFrame:
    """Ids with gaps; some movies without a year, and some without a genre."""
    rows = np.arange(NUM_MOVIES)
    return pd.DataFrame(
        {
            "movie_id": 1 + 3 * rows,
            "title": [f"Movie, The {i}th" for i in rows],
            "genres": ["|".join(GENRES[rng.random(4) < 0.4]) for _ in rows],
            "year": np.where(rows % 9 == 0, 0, 1940 + rows),
        }
    )


def ratings_frame(rng: np.random.Generator) -> pd.DataFrame:
    """Users who mostly watch what many watch, and each like one half of it."""
    popularity = 1 / (5 + np.arange(NUM_MOVIES))
    # 24 to 41 ratings: each last digit, on which the split depends, is there.
    counts = {1 + 2 * u: 24 + u % 18 for u in range(40)} | {NEWCOMER: 2}
    frames = []
    for user, count in counts.items():
        movies = rng.choice(
            NUM_MOVIES, count, replace=False, p=popularity / popularity.sum()
        )
        stars = np.where(movies % 2 == user % 4 // 2, 4.0, 2.5)
        times = np.sort(rng.choice(10**7, count, replace=False)) + 10**9
        frames.append(
            pd.DataFrame(
                {
                    "user_id": user,
                    "movie_id": 1 + 3 * movies,
                    "rating": stars + rng.integers(-2, 3, count) / 2,
                    "timestamp": times,
                }
            )
        )
    return pd.concat(frames, ignore_index=True).astype({"rating": "float32"})


@pytest.fixture(scope="session")
def movielens() -> MovieLens:
    rng = np.random.default_rng(11)
    return MovieLens(ratings_frame(rng), movies_frame(rng), "tiny")


@pytest.fixture(scope="session")
def windows(movielens):
    from recsys_examples.movielens.pipeline import make_windows

    return make_windows(movielens)


@pytest.fixture(scope="session")
def settings():
    from recsys_examples.movielens.model import Settings

    return Settings(dimensions=8, units=8, num_experts=2, batch_size=32, max_epochs=2)


@pytest.fixture(scope="session")
def trained(windows, settings):
    """A ranker that was selected, trained and measured; for two files of tests."""
    from recsys_examples.movielens.pipeline import run_ranker

    return run_ranker(windows, settings, verbose=0)
