"""Detects data sets whose ratings are not in time order.

The ranker is a sequence model, and the split is by time. In a data set without real
timestamps the ratings have another order: that of the file, or one by movie that is
similar for all users. A sequence model learns that order and predicts the test window
from it; its ranking metrics are then meaningless for real use.

Two statistics detect this. On whole data sets, and in brackets on the first 150 users
of the default data (a `--quick` run):

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
Limitations: an order that differs between users, such as one by stars, is not detected;
real timestamps give a warning if they are rounded to days (many ties), or if all users
rate in the order of release.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from recsys_examples.movielens.split import in_time_order

# Midway between the highest value of real timestamps (0.04 and 0.42) and the lowest
# value to be detected (0.64 and 0.87).
_MAX_TIED = 0.35
_MAX_AGREEMENT = 0.65

_MAX_USERS = 5000  # in the sample, which bounds the time
_MIN_USERS = 10  # for a mean correlation
_MIN_MOVIES = 5  # per user, for a correlation


@dataclass(frozen=True)
class Order:
    """Statistics of the order of ratings within users.

    Attributes:
        tied: fraction of the pairs of a user's ratings with equal timestamps, mean
            over users; NaN if no user has two ratings.
        agreement: Spearman correlation between the position of a movie in a user's
            sequence and its mean position in those of the other users, mean over
            users. 0 for random order, near 1 if the order is the same for all users;
            NaN if fewer than 10 users have 5 movies that other users rated.
    """

    tied: float
    agreement: float


def order_warnings(ratings: pd.DataFrame) -> list[str]:
    """Return a warning if the order within users does not look like an order in time.

    Args:
        ratings: data frame with at least `user_id`, `movie_id` and `timestamp`, in the
            order of the file.

    Returns:
        A list of one warning, with the reasons, or an empty list.
    """
    order = measure_order(ratings)
    reasons = []
    if order.tied > _MAX_TIED:
        reasons.append(
            f"{order.tied:.0%} of the pairs of a user's ratings have the same "
            "timestamp and are in the order of the file"
        )
    if order.agreement > _MAX_AGREEMENT:
        reasons.append(
            "movies are in a similar order for all users (mean rank correlation "
            f"{order.agreement:.2f})"
        )
    if not reasons:
        return []
    return [
        f"The ratings of a user do not seem to be ordered by time: "
        f"{', and '.join(reasons)}. Sequence models learn this order: their ranking "
        "metrics are meaningless for real use."
    ]


def measure_order(ratings: pd.DataFrame) -> Order:
    """Compute the statistics on a random sample of at most 5,000 users.

    Args:
        ratings: as in `order_warnings`.
    """
    ordered = in_time_order(_sample_users(ratings))
    return Order(_tied(ordered), _agreement(ordered))


def _sample_users(ratings: pd.DataFrame) -> pd.DataFrame:
    users = np.asarray(ratings["user_id"].unique())
    if len(users) <= _MAX_USERS:
        return ratings
    some = np.random.default_rng(0).choice(users, _MAX_USERS, replace=False)
    return ratings[ratings["user_id"].isin(some)]


def _tied(ordered: pd.DataFrame) -> float:
    sizes = ordered.groupby(["user_id", "timestamp"]).size()
    tied = (sizes * (sizes - 1)).groupby("user_id").sum()
    count = sizes.groupby("user_id").sum()
    return float((tied / (count * (count - 1)))[count > 1].mean())


def _agreement(ordered: pd.DataFrame) -> float:
    users = ordered.groupby("user_id")["user_id"]
    place = ((users.cumcount() + 0.5) / users.transform("size")).to_numpy()
    movies, _ = pd.factorize(ordered["movie_id"])
    others = np.bincount(movies)[movies] - 1
    # The user's own position is excluded from the mean.
    sum_of_others = np.bincount(movies, place)[movies] - place
    compared = pd.DataFrame(
        {
            "user": ordered["user_id"].to_numpy(),
            "place": place,
            "elsewhere": sum_of_others / np.maximum(others, 1),
        }
    )[others > 0]
    found = _rank_correlations(compared)
    return float(found.mean()) if len(found) >= _MIN_USERS else float("nan")


def _rank_correlations(compared: pd.DataFrame) -> pd.Series:
    """Return the Spearman correlation of `place` and `elsewhere` by user."""
    ranks = compared.groupby("user")[["place", "elsewhere"]].rank()
    x, y = (
        ranks[name] - ranks[name].groupby(compared["user"]).transform("mean")
        for name in ("place", "elsewhere")
    )
    products = pd.DataFrame({"xy": x * y, "xx": x * x, "yy": y * y})
    users = products.groupby(compared["user"])
    sums = users.sum()[(users.size() >= _MIN_MOVIES).to_numpy()]
    sums = sums[sums["yy"] > 0]
    return sums["xy"] / np.sqrt(sums["xx"] * sums["yy"])
