"""The movie tower of the ranker: vectors and biases, of one movie or of all.

    v_i = id embedding_i + projected genres and year of i
    score_t(user, i) = <user, v_i> + bias_t(i)

Axis letters: b batch, d dimensions of a vector, i movies of the catalogue.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from recsys_examples.movielens.features import NO_MOVIE, Catalogue

FIRST_MOVIE = 2  # IntegerLookup maps padding to 0 and unknown movies to 1
_YEARS = tuple(range(1920, 2030, 3))


def normal(stddev: float) -> keras.initializers.Initializer:
    """Return a normal initializer."""
    return keras.initializers.RandomNormal(stddev=stddev)


class MovieEncoder:
    """Vectors and biases of movies, from raw values or for the whole catalogue."""

    def __init__(
        self,
        catalogue: Catalogue,
        popularity: np.ndarray,
        dimensions: int,
        tasks: tuple[str, ...],
    ) -> None:
        self.lookup = layers.IntegerLookup(
            vocabulary=catalogue.movie_ids, mask_token=NO_MOVIE, name="movie_lookup"
        )
        genres = np.unique(catalogue.genres[catalogue.genres != ""])
        self._genre_lookup = layers.StringLookup(
            vocabulary=genres if len(genres) else ["none at all"],  # must not be empty
            mask_token="",
            output_mode="multi_hot",
            name="genres_hot",
        )
        self._year_bins = layers.Discretization(_YEARS, name="year_bins")
        self._genres_per_movie = catalogue.genres.shape[1]
        self._vectors = layers.Embedding(
            self.lookup.vocabulary_size(),
            dimensions,
            embeddings_initializer=normal(0.05),
            name="movies",
        )
        self._project = layers.Dense(
            dimensions,
            use_bias=False,
            kernel_initializer=normal(0.025),
            name="movie_content",
        )
        initial = {"watch": np.log(popularity + 0.5) - 6, "rating": 3.5}
        self._biases = {
            task: self._bias(task, initial.get(task, 0.0), len(catalogue))
            for task in tasks
        }
        self._content = self._encode(catalogue.genres, catalogue.years)

    def _bias(self, task: str, initial: Any, num_movies: int) -> keras.layers.Layer:
        bias = layers.Embedding(
            self.lookup.vocabulary_size(), 1, name=f"movie_bias_{task}"
        )
        bias.build((None,))
        values = np.broadcast_to(initial, num_movies)
        unknown = np.full(FIRST_MOVIE, values.min())
        bias.set_weights([np.concatenate([unknown, values])[:, None]])
        return bias

    def _encode(self, genres: Any, years: Any) -> Any:
        hot = ops.cast(self._genre_lookup(genres), "float32")
        period = ops.one_hot(self._year_bins(years), len(_YEARS) + 1)
        return ops.concatenate([hot, period], axis=-1)

    def inputs(self) -> dict[str, Any]:
        return {
            "movie_id": keras.Input((), dtype="int64", name="movie_id"),
            "genres": keras.Input(
                (self._genres_per_movie,), dtype="string", name="genres"
            ),
            "year": keras.Input((), dtype="int64", name="year"),
        }

    def score_of_one(self, task: str, movie: dict[str, Any], user: Any) -> Any:
        """(b, d) user vectors -> (b,) scores of one movie per row."""
        row = self.lookup(movie["movie_id"])
        content = self._encode(movie["genres"], movie["year"])
        vector = self._vectors(row) + self._project(content)
        return ops.sum(user * vector, -1) + ops.squeeze(self._biases[task](row), -1)

    def scores_of_all(self, task: str) -> CatalogueScores:
        """Return a layer from user vectors (b, d) to scores (b, i)."""
        return CatalogueScores(
            self._vectors,
            self._project,
            self._biases[task],
            self._content,
            name=f"catalogue_{task}",  # a TensorFlow scope cannot start with "_"
        )


class CatalogueScores(layers.Layer):
    """Scores of all movies for user vectors, by one matmul."""

    def __init__(
        self, vectors: Any, project: Any, biases: Any, content: Any, name: str
    ) -> None:
        super().__init__(name=name)
        self.vectors, self.project, self.biases = vectors, project, biases
        self.content = ops.convert_to_tensor(content)
        self.rows = np.arange(len(content)) + FIRST_MOVIE

    def call(self, users: Any) -> Any:
        vectors, biases = self.all_movies()
        return ops.matmul(users, ops.transpose(vectors)) + biases

    def all_movies(self) -> tuple[Any, Any]:
        """Return the vectors (i, d) and the biases (i,) of the catalogue."""
        vectors = self.vectors(self.rows) + self.project(self.content)
        return vectors, ops.squeeze(self.biases(self.rows), -1)
