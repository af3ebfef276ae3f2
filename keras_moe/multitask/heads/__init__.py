"""The output forms of tasks: last activation, loss and prediction.

A head has no weights: `keras_moe.multitask.Task.tower` gives it to a tower.
"""

from __future__ import annotations

from typing import Any

from keras_moe import _checks
from keras_moe.multitask.heads._base import Head
from keras_moe.multitask.heads.binary import Binary, LogLoss
from keras_moe.multitask.heads.multi_class import ClassLoss, MultiClass
from keras_moe.multitask.heads.ordinal import Ordinal, OrdinalLoss
from keras_moe.multitask.heads.ranking import Ranking, RankingLoss
from keras_moe.multitask.heads.regression import Regression, SquaredError
from keras_moe.multitask.heads.zero_inflated_lognormal import ZILN, ZILNLoss

__all__ = [
    "ZILN",
    "Binary",
    "ClassLoss",
    "Head",
    "LogLoss",
    "MultiClass",
    "Ordinal",
    "OrdinalLoss",
    "Ranking",
    "RankingLoss",
    "Regression",
    "SquaredError",
    "ZILNLoss",
    "get",
]

_NAMES = {
    "binary": Binary,
    "ranking": Ranking,
    "regression": Regression,
    "ziln": ZILN,
}


def get(identifier: Any, argument: str = "identifier") -> Head:
    """Return a head: "binary", "regression", "ziln", "ranking", a config, or itself.

    Raises:
        ValueError: if the identifier is none of them.

    Example:

    >>> keras_moe.multitask.heads.get("binary")
    Binary()
    """
    if isinstance(identifier, Head):
        return identifier
    if isinstance(identifier, str) and identifier in _NAMES:
        return _NAMES[identifier]()
    if isinstance(identifier, dict):
        head = _checks.deserialized(argument, identifier)
        if isinstance(head, Head):
            return head
    raise ValueError(
        f"`{argument}` must be one of {sorted(_NAMES)}, or a head with its size, such "
        "as keras_moe.multitask.heads.Ordinal(5) or MultiClass(3). "
        f"Received: {argument}={identifier!r}"
    )
