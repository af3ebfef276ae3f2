"""Synthetic catalogues of any size, grown from a trained first stage.

The movies of the data come first and are unchanged, with the same users and histories.
Each further movie has a parent among the movies with enough ratings, drawn uniformly:

    vector     that of the parent + normal noise, `NOISE` standard deviations of the
               catalogue per dimension (the last dimension is the bias)
    features   genres, popularity, stars, likes and year of the parent
    relations  the related movies of the parent and their weights; in all lists, each
               related movie is replaced by itself or one of its children at random

The retrieval index holds all movies. Latency depends on sizes, not on the quality of
the recommendations, which a synthetic catalogue says nothing about.

Axis letters: i movies, n movies of the data, d dimensions, s related movies.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from recsys_examples.movielens.features import Catalogue
from recsys_examples.two_stage.first_stage import FirstStage
from recsys_examples.two_stage.pairs import PairFeatures
from recsys_examples.two_stage.retrieval import UnseenRetrieval
from recsys_examples.two_stage.settings import Settings
from recsys_examples.two_stage.statistics import Related, Statistics
from recsys_examples.two_stage.towers import Index

NOISE = 0.3


def draw_parents(
    popularity: np.ndarray, size: int, fewest_ratings: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the parents (i,) of a catalogue: those of the data are their own.

    Args:
        popularity: (n,) number of ratings of each movie of the data.
        size: number of movies, at least n.
        fewest_ratings: minimal number of ratings of a parent.
        rng: random generator.
    """
    count = len(popularity)
    eligible = np.flatnonzero(popularity >= min(fewest_ratings, popularity.max()))
    return np.concatenate([np.arange(count), rng.choice(eligible, size - count)])


def grow_vectors(
    vectors: np.ndarray, parents: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the vectors (i, d) of a grown catalogue from those of the data (n, d)."""
    grown = vectors[parents]
    children = grown[len(vectors) :]
    scale = NOISE * vectors.std(axis=0, dtype=np.float32)
    children += scale * rng.standard_normal(children.shape, np.float32)
    return grown


def grow_related(
    related: Related, parents: np.ndarray, rng: np.random.Generator
) -> Related:
    """Return the related movies of a grown catalogue."""
    children = np.argsort(parents, kind="stable")
    counts = np.bincount(parents, minlength=len(related.rows))
    starts = np.cumsum(counts) - counts
    rows = related.rows[parents]
    nth = (rng.random(rows.shape, np.float32) * counts[rows]).astype(np.int64)
    nth = np.minimum(nth, counts[rows] - 1)  # float32 may round up
    return Related(
        children[starts[rows] + nth].astype(np.int32), related.weights[parents]
    )


class GrownStage(FirstStage):
    """A first stage whose catalogue is grown from that of another one.

    Args:
        stage: the trained first stage.
        parents: (i,) see `draw_parents`.
        settings: number of candidates, and of related movies.
        rng: random generator.
    """

    def __init__(
        self,
        stage: FirstStage,
        parents: np.ndarray,
        settings: Settings,
        rng: np.random.Generator,
    ) -> None:
        vectors = grow_vectors(stage.retrieval.candidates, parents, rng)
        self.retrieval = replace(stage.retrieval, candidates=vectors)
        self.past = stage.past
        self.catalogue = _grow_catalogue(stage.catalogue, parents)
        self.take(settings.candidates)
        known = Statistics.of(stage.past, stage.catalogue, settings.related)
        self.pairs = PairFeatures(
            Statistics(
                self.catalogue.movie_ids,
                known.movies[parents],
                known.genres[parents],
                grow_related(known.following, parents, rng),
                grow_related(known.similar, parents, rng),
            )
        )

    def take(self, candidates: int) -> None:
        """Retrieve so many candidates from now on."""
        vectors = self.retrieval.candidates
        find = UnseenRetrieval(vectors, k=candidates)
        self.index = Index(find, np.arange(len(vectors)), len(vectors))


def _grow_catalogue(catalogue: Catalogue, parents: np.ndarray) -> Catalogue:
    ids = catalogue.movie_ids
    new = ids[-1] + 1 + np.arange(len(parents) - len(ids))
    return Catalogue(
        np.concatenate([ids, new]),
        catalogue.titles.astype(object)[parents],  # references to one string each
        catalogue.genres[parents, :0],  # those of the statistics are used
        catalogue.years[parents],
    )
