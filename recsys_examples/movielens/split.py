"""Training, validation and test ratings, by time within each user."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from recsys_examples.errors import InputError

_MIN_RATINGS = 3  # one for each part


@dataclass(frozen=True)
class Split:
    """The three parts of the ratings.

    Each part has the columns of the ratings and is sorted by user and time. The sort is
    stable: ratings with equal timestamps keep their order.

    Attributes:
        train: the earliest ratings of each user.
        validation: the following ratings, for tuning.
        test: the last ratings of each user.
    """

    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame

    @property
    def before_test(self) -> pd.DataFrame:
        """Training and validation ratings in the same order, for the final model."""
        return in_time_order(pd.concat([self.train, self.validation]))


def split_by_time(ratings: pd.DataFrame) -> Split:
    """Split the ratings by time within each user.

    The test part has the last `max(1, floor(0.1 n))` of a user's n ratings, the
    validation part as many before them, and the training part the rest. Users with
    fewer than three ratings are only in the training part.

    The split is by time because a recommender predicts what a user does next: with a
    random split it could use later ratings to predict earlier ones, which no deployed
    model can. It is within users, not at one date for all, because most MovieLens users
    rate within a few days: few users have ratings before and after a given date. As a
    consequence, some training ratings are later than test ratings of other users.

    Args:
        ratings: data frame with at least `user_id` and `timestamp`.

    Returns:
        The three parts, a partition of the rows.

    Raises:
        InputError: if no user has three ratings.

    Example:

    >>> ratings = pd.DataFrame({"user_id": [7, 7, 7, 7], "timestamp": [4, 1, 3, 2]})
    >>> parts = split_by_time(ratings)
    >>> list(parts.train.timestamp)
    [1, 2]
    >>> list(parts.validation.timestamp), list(parts.test.timestamp)
    ([3], [4])
    """
    ordered = in_time_order(ratings)
    users = ordered.groupby("user_id")["user_id"]
    count = users.transform("size")
    _check_splittable(count)
    held_out = (count // 10).clip(lower=1).where(count >= _MIN_RATINGS, 0)
    from_end = users.cumcount(ascending=False)  # 0 for a user's last rating
    is_test = from_end < held_out
    is_train = from_end >= 2 * held_out
    return Split(
        train=ordered[is_train].reset_index(drop=True),
        validation=ordered[~is_train & ~is_test].reset_index(drop=True),
        test=ordered[is_test].reset_index(drop=True),
    )


def in_time_order(ratings: pd.DataFrame) -> pd.DataFrame:
    """Sort by user and time; ratings with equal timestamps keep their order."""
    # lexsort is stable, and its last key is the primary one.
    order = np.lexsort((ratings["timestamp"], ratings["user_id"]))
    return ratings.iloc[order].reset_index(drop=True)


def _check_splittable(count: pd.Series) -> None:
    most = int(count.max()) if len(count) else 0
    if most < _MIN_RATINGS:
        raise InputError(
            f"a split by time needs a user with at least {_MIN_RATINGS} ratings; "
            f"the largest number per user is {most}"
        )
