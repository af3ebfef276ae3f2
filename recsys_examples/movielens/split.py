"""Training, validation and test ratings, by time within each user."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from recsys_examples.errors import InputError

_FEWEST_RATINGS = 3  # one for each part


@dataclass(frozen=True)
class Split:
    """The three parts of the ratings.

    Each part has the columns of the ratings and is sorted by user and time; ratings
    of a user with the same timestamp keep the order they had.

    Attributes:
        train: the earliest ratings of each user.
        validation: the ratings after them, to choose hyperparameters on.
        test: each user's last ratings, to report on.
    """

    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame

    @property
    def before_test(self) -> pd.DataFrame:
        """Train and validation together, in the same order, for a final training."""
        return in_time_order(pd.concat([self.train, self.validation]))


def split_by_time(ratings: pd.DataFrame) -> Split:
    """Split the ratings by time within each user.

    The test takes the last `max(1, floor(0.1 n))` of a user's n ratings, the
    validation as many before them, and the training the rest. A user with fewer than
    three ratings is wholly in the training part.

    By time, because a recommender has to foresee what a user does next: a random
    split would let it learn from a user's later ratings to guess the earlier ones, a
    score that no deployed model reaches. Within each user rather than at one date for
    all, because most MovieLens users rate within a few days: one date would leave
    hardly any user with ratings on both sides of it. The price is that the training
    part holds ratings of some users that are later than the test ratings of others.

    Args:
        ratings: a data frame with at least `user_id` and `timestamp`.

    Returns:
        The three parts, which together hold every row once.

    Raises:
        InputError: no user has three ratings, so nothing could be held out.

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
    held_out = (count // 10).clip(lower=1).where(count >= _FEWEST_RATINGS, 0)
    from_end = users.cumcount(ascending=False)  # 0 for a user's last rating
    is_test = from_end < held_out
    is_train = from_end >= 2 * held_out
    return Split(
        train=ordered[is_train].reset_index(drop=True),
        validation=ordered[~is_train & ~is_test].reset_index(drop=True),
        test=ordered[is_test].reset_index(drop=True),
    )


def in_time_order(ratings: pd.DataFrame) -> pd.DataFrame:
    """Sort by user and time; ratings with the same timestamp keep their order."""
    # lexsort sorts by its last key first, and keeps the order of equal rows.
    order = np.lexsort((ratings["timestamp"], ratings["user_id"]))
    return ratings.iloc[order].reset_index(drop=True)


def _check_splittable(count: pd.Series) -> None:
    most = int(count.max()) if len(count) else 0
    if most < _FEWEST_RATINGS:
        raise InputError(
            f"a split by time needs a user with at least {_FEWEST_RATINGS} ratings; "
            f"the most that any user has is {most}"
        )
