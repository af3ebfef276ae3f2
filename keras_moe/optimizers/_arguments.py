"""Arguments that an optimizer refuses, in one place for all of them."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from typing import Any

import keras

from keras_moe import _backend, _checks

EMBEDDINGS = r"(^|/)embeddings$"
# They change all rows of a table in every step, or (AMSGrad) are not there.
_NOT_FOR_TABLES = ("weight_decay", "use_ema", "gradient_accumulation_steps", "amsgrad")


def checked_pattern(tables: Any) -> str:
    """Return `tables`, a regular expression for the paths of variables."""
    try:
        if not isinstance(tables, str):  # A pattern of bytes compiles, too.
            raise TypeError
        re.compile(tables)
    except (re.error, TypeError) as problem:
        raise ValueError(
            "`tables` must be a regular expression for the paths of variables. "
            f"Received: tables={tables!r}"
        ) from problem
    return tables


def checked(optimizer: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an optimizer after checks that Keras leaves out.

    Keras takes any object as, for example, `beta_1`, and fails in a step.
    """
    for name, value in arguments.items():
        check = _CHECKS.get(name)
        if check is not None and value is not None:
            arguments[name] = check(name, value)
        elif value is None and name in _REQUIRED:
            raise ValueError(
                f"{optimizer}: `{name}` must not be None. Received: {name}=None"
            )
    return arguments


def _learning_rate(name: str, value: Any) -> Any:
    if isinstance(value, numbers.Number):
        return _checks.non_negative_number(name, value)
    rule = "a number >= 0, a LearningRateSchedule or a function without arguments"
    kind = keras.optimizers.schedules.LearningRateSchedule
    return _checks.keras_object(name, value, rule, lambda given: given, kind)


def _at_least_2(name: str, value: Any) -> int:
    return _checks.count(name, value, least=2)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "learning_rate": _learning_rate,
    "beta_1": _checks.rate,
    "beta_2": _checks.rate,
    "epsilon": _checks.non_negative_number,
    "initial_accumulator_value": _checks.non_negative_number,
    "amsgrad": _checks.flag,
    "weight_decay": _checks.non_negative_number,
    "clipnorm": _checks.positive_number,
    "clipvalue": _checks.positive_number,
    "global_clipnorm": _checks.positive_number,
    "use_ema": _checks.flag,
    "ema_momentum": _checks.rate,
    "ema_overwrite_frequency": _checks.positive_int,
    "loss_scale_factor": _checks.positive_number,
    "gradient_accumulation_steps": _at_least_2,
    "name": _checks.text,
}
_REQUIRED = (
    "learning_rate",
    "beta_1",
    "beta_2",
    "epsilon",
    "initial_accumulator_value",
    "amsgrad",
    "use_ema",
    "ema_momentum",
)


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
