"""What each expert has come to stand for: whom the gates send to it.

A profile compares the users of an expert, weighted by their gate weights, with all
users. Everything is a *lift*: the weighted mean over the mean of all users, 1 for an
expert whose users are like the average. Counts would show the same common genres for
every expert.

Axis letters: u users, t tasks, e experts, i movies, c columns (genres, decades or
groups).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recsys_examples.movielens.experts import gate_weights
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import Ranker

# A genre or decade with a smaller share of the ratings has a lift of chance.
LEAST_SHARE = 0.01
NOTABLE_LIFT = 1.05  # what stands out, in print

_BATCH_SIZE = 256
KINDS = ("genre", "decade", "user")


class Lifts(NamedTuple):
    """Lifts of named columns.

    Attributes:
        names: the c names.
        values: (e, c), the lift of each column for each expert.
    """

    names: tuple[str, ...]
    values: np.ndarray

    def top(self, expert: int, most: int = 3) -> list[tuple[str, float]]:
        """Return the names and lifts that stand out for an expert, highest first."""
        own = self.values[expert]
        order = np.argsort(-own, kind="stable")[:most]
        return [(self.names[c], float(own[c])) for c in order if own[c] > NOTABLE_LIFT]


class Profile(NamedTuple):
    """What the experts stand for.

    Attributes:
        tasks: the t tasks.
        weights: (t, e), the mean gate weight of the users.
        genre: lifts of the share of a genre among a user's ratings.
        decade: lifts of the share of a decade of release.
        user: lifts of the share of users in a group: thirds of all users by number of
            ratings, by mean stars and by date of the last rating.
    """

    tasks: tuple[str, ...]
    weights: np.ndarray
    genre: Lifts
    decade: Lifts
    user: Lifts

    @property
    def num_experts(self) -> int:
        """The number of experts, 0 for a body without any."""
        return self.weights.shape[1]


def profile_experts(
    ranker: Ranker, sequences: Sequences, catalogue: Catalogue
) -> Profile:
    """Return the profile of a ranker's experts over the users with ratings.

    A body without experts has a profile of no expert.
    """
    tasks = tuple(ranker.towers)
    if not hasattr(ranker.body, "experts"):
        none = Lifts((), np.zeros((0, 0), "float32"))
        return Profile(tasks, np.zeros((len(tasks), 0), "float32"), none, none, none)
    users = np.flatnonzero(sequences.lengths)
    gates = []
    for start in range(0, len(users), _BATCH_SIZE):
        batch = users[start : start + _BATCH_SIZE]
        rows = ranker.user(sequences.histories(catalogue, batch), training=False)
        gates.append(np.asarray(gate_weights(ranker.body, rows, len(tasks))))
    weights = np.concatenate(gates)  # (u, t, e)
    by_user = weights.mean(axis=1)
    ratings = sequences.matrix(len(catalogue))[users]
    counts = sequences.lengths[users][:, None]

    def of_movies(columns: dict[str, np.ndarray]) -> Lifts:
        """Lifts of columns of movies, (i,) bool by name."""
        names = tuple(columns)
        movies = np.stack([columns[name] for name in names], axis=1).astype("float32")
        shares = (ratings @ movies) / counts
        common = ratings.sum(axis=0) @ movies / ratings.sum() >= LEAST_SHARE
        common = np.asarray(common).ravel()
        kept = tuple(n for n, c in zip(names, common, strict=True) if c)
        return Lifts(kept, lifts(by_user, shares[:, common]))

    groups = user_groups(sequences, users)
    return Profile(
        tasks,
        weights.mean(axis=0).astype("float32"),
        of_movies(_genres(catalogue)),
        of_movies(_decades(catalogue)),
        Lifts(tuple(groups), lifts(by_user, np.stack([*groups.values()], axis=1))),
    )


def lifts(weights: np.ndarray, shares: Any) -> np.ndarray:
    """Return (e, c): the weighted mean of each column over its mean.

    1 for an expert without weight, and for a column of zeros.

    Args:
        weights: (u, e), not negative.
        shares: (u, c), not negative.
    """
    shares = np.asarray(shares, "float64")
    total = weights.sum(axis=0)[:, None]
    mean = np.broadcast_to(shares.mean(axis=0), (weights.shape[1], shares.shape[1]))
    weighted = weights.T @ shares
    found = np.ones(mean.shape)
    np.divide(weighted, total * mean, out=found, where=total * mean > 0)
    return found.astype("float32")


def user_groups(sequences: Sequences, users: np.ndarray) -> dict[str, np.ndarray]:
    """Return groups of users: bool (u,) by name, thirds of the users by a figure.

    Args:
        sequences: the ratings.
        users: rows of users with at least one rating.
    """
    ends = sequences.starts[users + 1]
    totals = np.concatenate([[0.0], np.cumsum(sequences.ratings, dtype="float64")])
    stars = (totals[ends] - totals[sequences.starts[users]]) / sequences.lengths[users]
    figures = {
        ("few ratings", "many ratings"): sequences.lengths[users],
        ("low stars", "high stars"): stars,
        ("seen long ago", "seen lately"): sequences.timestamps[ends - 1],
    }
    groups = {}
    for (low, high), values in figures.items():
        third, two_thirds = np.quantile(values, [1 / 3, 2 / 3])
        groups[low], groups[high] = values <= third, values >= two_thirds
    return groups


def _genres(catalogue: Catalogue) -> dict[str, np.ndarray]:
    names = np.unique(catalogue.genres[catalogue.genres != ""])
    return {str(name): (catalogue.genres == name).any(axis=1) for name in names}


def _decades(catalogue: Catalogue) -> dict[str, np.ndarray]:
    decades = catalogue.years // 10 * 10
    known = np.unique(decades[catalogue.years > 0])
    return {f"{decade}s": decades == decade for decade in known}
