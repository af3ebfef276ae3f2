"""The first stage: candidates of each user, with the features of the pairs.

Axis letters: b users, n examples, c candidates, i movies of the catalogue, u user
features, p pair features.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.two_stage.pairs import PairFeatures
from recsys_examples.two_stage.retrieval import make_index
from recsys_examples.two_stage.settings import LIST_LENGTH, Settings
from recsys_examples.two_stage.statistics import Statistics
from recsys_examples.two_stage.towers import MASKED_SCORE, Retrieval

BATCH_SIZE = 256


class Candidates(NamedTuple):
    """The output of the first stage.

    Attributes:
        rows: (n, c) catalogue rows, -1 where there are fewer than c candidates.
        users: (n, u) features of the users.
        pairs: (n, c, p) features of the pairs.
    """

    rows: np.ndarray
    users: np.ndarray
    pairs: np.ndarray


class FirstStage:
    """The retrieval index and the pair features, from the ratings up to some time.

    Args:
        retrieval: the trained towers.
        past: the ratings they were trained on.
        catalogue: all movies.
        settings: number of candidates, and of related movies.
    """

    def __init__(
        self,
        retrieval: Retrieval,
        past: Sequences,
        catalogue: Catalogue,
        settings: Settings,
    ) -> None:
        self.retrieval, self.past, self.catalogue = retrieval, past, catalogue
        popularity = np.bincount(past.movies, minlength=len(catalogue))
        self.index = make_index(retrieval.candidates, popularity, settings)
        self.pairs = PairFeatures(Statistics.of(past, catalogue, settings.related))

    def candidates(
        self, sequences: Sequences, users: np.ndarray, ends: np.ndarray
    ) -> Candidates:
        """Return candidates, given the first `ends` ratings of each user.

        Args:
            sequences: ratings of the users.
            users: (n,) user rows.
            ends: (n,) number of the user's ratings that are used.
        """
        found = [
            self._candidates(sequences, users[at:][:BATCH_SIZE], ends[at:][:BATCH_SIZE])
            for at in range(0, len(users), BATCH_SIZE)
        ]
        return Candidates(*map(np.concatenate, zip(*found, strict=True)))

    def _candidates(
        self, sequences: Sequences, users: np.ndarray, ends: np.ndarray
    ) -> Candidates:
        user = sequences.histories(self.catalogue, users, ends)
        tensors = {name: keras.ops.convert_to_tensor(v) for name, v in user.items()}
        nth = np.arange(ends.sum()) - np.repeat(np.cumsum(ends) - ends, ends)
        seen = sequences.movies[np.repeat(sequences.starts[users], ends) + nth]
        seen = np.stack([np.repeat(np.arange(len(users)), ends), seen], axis=1)
        queries = self.retrieval.query.predict_on_batch(user)
        scores, rows = self.index(
            (keras.ops.convert_to_tensor(queries), keras.ops.convert_to_tensor(seen))
        )
        of_user, of_pair = self.pairs(tensors, rows, scores)
        masked = np.asarray(scores) < MASKED_SCORE / 2
        rows = np.where(masked, -1, np.asarray(rows))
        return Candidates(rows, np.asarray(of_user), np.asarray(of_pair))


def check_candidates(candidates: int, num_movies: int) -> None:
    """Raise InputError if the number of candidates is out of range."""
    if not LIST_LENGTH <= candidates <= num_movies:
        raise InputError(
            f"candidates must be from {LIST_LENGTH} (the length of a list) to "
            f"{num_movies:,} (the number of movies); got {candidates:,}"
        )
