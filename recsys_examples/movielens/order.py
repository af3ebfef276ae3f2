"""Whether the order of a user's ratings can be an order in time.

The ranker reads a user's ratings as a sequence, and the split cuts that sequence. In a
data set without real timestamps it has another order: that of the file, or one by
movie that is alike for all users. A sequence model learns that order and predicts the
test window from it, so its ranking figures say nothing about real use.

Two figures detect this. Measured on whole data sets, and in brackets on the first 150
users of the default data (a `--quick` run):

    timestamps                          tied           agreement
    default data as it is               0.02 (0.02)    0.21 (0.16)
    default data, in random order       0.00 (0.00)    0.00 (0.01)
    default data, by movie id           0.00 (0.00)    0.90 (0.87)
    default data, by popularity         0.01 (0.04)    0.98 (0.96)
    default data, one for all           1.00 (1.00)    0.90 (0.87)
    the same, file in random order      1.00 (1.00)    0.00 (-0.02)
    default data, rounded to hours      0.64 (0.64)    0.53 (0.46)
    default data, by stars              0.26 (0.26)    0.37 (0.33)
    ml-100k as it is                    0.04           0.42
    ml-100k, by movie id                0.00           0.99

The default file is sorted by movie id within each user; that of ml-100k is not sorted.
Not detected is an order that differs from user to user, such as one by stars. Real
timestamps that cause a warning all the same: those by the day (many ties), and ratings
that all users give in the order of release.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from recsys_examples.movielens.split import in_time_order

# Midway between the highest figure of real timestamps (0.04 and 0.42) and the lowest
# of those to be warned of (0.64 and 0.87).
_MOST_TIED = 0.35
_MOST_AGREEMENT = 0.65

_MOST_USERS = 5000  # looked at, so that tens of millions of ratings take seconds
_FEWEST_USERS = 10  # whose agreement is worth a mean
_FEWEST_MOVIES = 5  # of a user, to be worth a correlation


@dataclass(frozen=True)
class Order:
    """How the ratings are ordered within users.

    Attributes:
        tied: share of the pairs of a user's ratings that have the same timestamp, as
            a mean over users; nan if no user has two ratings.
        agreement: Spearman's correlation between a movie's place in a user's sequence
            and its mean place in those of the other users, as a mean over users. 0 in
            random order, near 1 if the order is the same for all; nan if fewer than
            10 users have 5 movies that others rated too.
    """

    tied: float
    agreement: float


def order_warnings(ratings: pd.DataFrame) -> list[str]:
    """Return a warning if the order within users does not look like an order in time.

    Args:
        ratings: a data frame with at least `user_id`, `movie_id` and `timestamp`, its
            rows in the order of the file.

    Returns:
        One sentence or two that name the reason and what follows from it, or nothing.
    """
    order = measure_order(ratings)
    reasons = []
    if order.tied > _MOST_TIED:
        reasons.append(
            f"{order.tied:.0%} of the pairs of a user's ratings have the same "
            "timestamp and keep the order of the file"
        )
    if order.agreement > _MOST_AGREEMENT:
        reasons.append(
            "movies come in much the same order for all users (mean rank correlation "
            f"{order.agreement:.2f})"
        )
    if not reasons:
        return []
    return [
        f"The ratings of a user do not seem to be ordered by time: "
        f"{', and '.join(reasons)}. The sequence models read this order, so their "
        "ranking figures say nothing about real use."
    ]


def measure_order(ratings: pd.DataFrame) -> Order:
    """Measure the order within users, on at most 5,000 of them drawn at random.

    Args:
        ratings: as in `order_warnings`.
    """
    ordered = in_time_order(_of_some_users(ratings))
    return Order(_tied(ordered), _agreement(ordered))


def _of_some_users(ratings: pd.DataFrame) -> pd.DataFrame:
    users = np.asarray(ratings["user_id"].unique())
    if len(users) <= _MOST_USERS:
        return ratings
    some = np.random.default_rng(0).choice(users, _MOST_USERS, replace=False)
    return ratings[ratings["user_id"].isin(some)]


def _tied(ordered: pd.DataFrame) -> float:
    at_once = ordered.groupby(["user_id", "timestamp"]).size()
    tied = (at_once * (at_once - 1)).groupby("user_id").sum()
    count = at_once.groupby("user_id").sum()
    return float((tied / (count * (count - 1)))[count > 1].mean())


def _agreement(ordered: pd.DataFrame) -> float:
    users = ordered.groupby("user_id")["user_id"]
    place = ((users.cumcount() + 0.5) / users.transform("size")).to_numpy()
    movies, _ = pd.factorize(ordered["movie_id"])
    others = np.bincount(movies)[movies] - 1
    # A user's own place must not count: it would agree with itself.
    sum_of_others = np.bincount(movies, place)[movies] - place
    compared = pd.DataFrame(
        {
            "user": ordered["user_id"].to_numpy(),
            "place": place,
            "elsewhere": sum_of_others / np.maximum(others, 1),
        }
    )[others > 0]
    found = _rank_correlations(compared)
    return float(found.mean()) if len(found) >= _FEWEST_USERS else float("nan")


def _rank_correlations(compared: pd.DataFrame) -> pd.Series:
    """Return Spearman's correlation of `place` and `elsewhere` by user."""
    ranks = compared.groupby("user")[["place", "elsewhere"]].rank()
    x, y = (
        ranks[name] - ranks[name].groupby(compared["user"]).transform("mean")
        for name in ("place", "elsewhere")
    )
    products = pd.DataFrame({"xy": x * y, "xx": x * x, "yy": y * y})
    users = products.groupby(compared["user"])
    sums = users.sum()[(users.size() >= _FEWEST_MOVIES).to_numpy()]
    sums = sums[sums["yy"] > 0]
    return sums["xy"] / np.sqrt(sums["xx"] * sums["yy"])
