"""The baselines: popularity, item-based nearest neighbours, matrix factorisation."""

from __future__ import annotations

import itertools
import warnings
from typing import NamedTuple

import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.nearest_neighbours import CosineRecommender
from implicit.utils import ParameterWarning
from scipy import sparse
from threadpoolctl import threadpool_limits

from recsys_examples.movielens.ranking import Scorer


def popularity(interactions: sparse.csr_matrix) -> Scorer:
    """Score every movie by its number of ratings, equally for all users."""
    counts = np.asarray(interactions.sum(axis=0)).ravel()
    return lambda users: np.tile(counts, (len(users), 1))


class ALSSettings(NamedTuple):
    """Hyperparameters of implicit-feedback ALS, named as in the `implicit` package."""

    factors: int
    regularization: float
    alpha: float


ALS_GRID = tuple(
    itertools.starmap(
        ALSSettings,
        itertools.product(
            (16, 32, 64, 96, 128), (0.01, 0.1, 1.0, 10.0, 30.0), (0.5, 1, 2, 5, 10, 20)
        ),
    )
)
# The best of the grid on the validation window of the default data, found by --study.
# It may be far from the best on other data.
TUNED_ALS = ALSSettings(factors=96, regularization=10.0, alpha=1)
# For a single run on other data: every eleventh setting, which covers all values. The
# best of these has this fraction of the whole grid's best NDCG@10 on validation (in
# brackets that of TUNED_ALS): ml-100k 0.98 (0.98), the default data's first 150 users
# 1.00 (0.86), the default data in the order of movie ids 0.91 (0.82).
SMALL_ALS_GRID = (TUNED_ALS, *ALS_GRID[::11])


def als(
    interactions: sparse.csr_matrix, settings: ALSSettings, seed: int = 0
) -> Scorer:
    """Score movies by matrix factorisation (Hu, Koren and Volinsky, 2008)."""
    model = AlternatingLeastSquares(
        **settings._asdict(), iterations=15, random_state=seed
    )
    # implicit uses its own threads, and warns if BLAS is multi-threaded too.
    with threadpool_limits(1, "blas"):
        model.fit(interactions, show_progress=False)
    return lambda users: model.user_factors[users] @ model.item_factors.T


KNN_GRID = (20, 50, 100, 200, 500)


def item_knn(interactions: sparse.csr_matrix, neighbours: int) -> Scorer:
    """Score movies by their cosine similarity to the movies that a user has watched."""
    model = CosineRecommender(K=neighbours)
    with warnings.catch_warnings():
        # implicit warns about the format of a matrix that it converts itself.
        warnings.simplefilter("ignore", ParameterWarning)
        model.fit(interactions, show_progress=False)
    similarity = model.similarity.tocsr()
    return lambda users: (interactions[users] @ similarity).toarray()
