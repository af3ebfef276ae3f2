"""A tiny MovieLens data set, on which a ranker trains in seconds."""

import functools

import numpy as np
import pandas as pd
import pytest

from recsys_examples.movielens.data import MovieLens

NUM_MOVIES = 60
GENRES = np.array(["Action", "Comedy", "Drama", "War"])
NEWCOMER = 99  # a user with two ratings, both in the training window


def movies_frame(rng: np.random.Generator) -> pd.DataFrame:
    """Movies with gaps in their ids, some without a year, some without a genre."""
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
    """Users rate by popularity; each prefers the movies of one half."""
    popularity = 1 / (5 + np.arange(NUM_MOVIES))
    # 24 to 41 ratings: all last digits occur, on which the split depends.
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
    """A trained and evaluated ranker, shared by two test files."""
    from recsys_examples.movielens.pipeline import run_ranker

    return run_ranker(windows, settings, verbose=0)


@pytest.fixture
def eager_training(monkeypatch):
    """Train without graphs, in tests of what a command does with its results.

    Tracing a graph takes seconds, and tiny data sets have few steps. Other tests train
    with graphs.
    """
    import keras

    compile_for_graphs = keras.Model.compile

    @functools.wraps(compile_for_graphs)
    def compile_eagerly(self, *args, **kwargs):
        compile_for_graphs(self, *args, **{**kwargs, "run_eagerly": True})

    monkeypatch.setattr(keras.Model, "compile", compile_eagerly)
