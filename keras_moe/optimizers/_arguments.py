"""Arguments that an optimizer refuses, in one place for all of them."""

from __future__ import annotations

import re
from typing import Any

from keras_moe import _backend

EMBEDDINGS = r"(^|/)embeddings$"
# They change all rows of a table in every step, or (AMSGrad) are not there.
_NOT_FOR_TABLES = ("weight_decay", "use_ema", "gradient_accumulation_steps", "amsgrad")


def checked_pattern(tables: Any) -> str:
    """Return `tables`, a regular expression for the paths of variables."""
    try:
        re.compile(tables)
    except (re.error, TypeError) as problem:
        raise ValueError(
            "`tables` must be a regular expression for the paths of variables. "
            f"Received: tables={tables!r}"
        ) from problem
    return tables


def refuse_for_tables(optimizer: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments that change all rows of a table in each step."""
    for name in _NOT_FOR_TABLES:
        if arguments.get(name):
            raise ValueError(
                f"{optimizer}: `{name}` must not be set. It updates only the rows of a "
                "table that have a gradient, and has no AMSGrad. For the variables "
                "that are not tables, an optimizer of their own in "
                f"keras.optimizers.MultiOptimizer may have `{name}`. "
                f"Received: {name}={arguments[name]!r}"
            )


def refuse_under_replicas(optimizer: Any) -> None:
    """Raise ValueError for arguments with which Keras cannot update replicas.

    Keras updates them inside a condition, where `tf.distribute` cannot synchronize.
    """
    replicas = _backend.num_replicas()
    if replicas == 1:
        return
    given = {
        "ema_overwrite_frequency": optimizer.use_ema
        and optimizer.ema_overwrite_frequency,
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
    }
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{type(optimizer).__name__} under a tf.distribute strategy with "
                f"several replicas: `{name}` must not be set, which Keras does not "
                f"support there. Received: {name}={value!r}, {replicas} replicas"
            )
