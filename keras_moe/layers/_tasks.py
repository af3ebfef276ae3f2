"""The argument `tasks`: names give a dict of outputs, a number gives a list."""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence
from typing import Any

from keras_moe import _checks

# A task name is used for an output, a metric, a weight path and a SavedModel output,
# so it must be valid in all four.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Tasks:
    """The tasks of a layer, and the structure of their outputs."""

    count: int
    names: tuple[str, ...] | None

    def __init__(
        self, tasks: int | Sequence[str] | None, argument: str = "tasks"
    ) -> None:
        if isinstance(tasks, numbers.Integral):
            self.count = _checks.positive_int(argument, tasks)
            self.names = None
        else:
            self.names = _checked_names(tasks, argument)
            self.count = len(self.names)

    def pack(self, outputs: Sequence[Any]) -> dict[str, Any] | list[Any]:
        """Return one output per task as a dict by name, or as a list."""
        if self.names is None:
            return list(outputs)
        return dict(zip(self.names, outputs, strict=True))

    def repeat(self, value: Any) -> dict[str, Any] | list[Any]:
        """Return `value` for each task, in the structure of the outputs."""
        return self.pack([value] * self.count)

    @property
    def keys(self) -> tuple[Any, ...]:
        """The keys of the outputs: names, or indices."""
        return tuple(range(self.count)) if self.names is None else self.names

    @property
    def config(self) -> int | list[str]:
        """The argument `tasks` that recreates this object."""
        return self.count if self.names is None else list(self.names)


def _checked_names(tasks: Any, argument: str) -> tuple[str, ...]:
    rule = "a number of tasks or a sequence of task names, in order"
    names = _checks.items(argument, tasks, rule)
    if not names:
        raise ValueError(
            f"`{argument}` must name at least one task. Received: {tasks!r}"
        )
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"every name in `{argument}` must start with a letter, followed by "
                "letters, digits, '_', '.' and '-'. "
                f"Received: {name!r} in {argument}={tasks!r}"
            )
    names = tuple(map(str, names))  # Without NumPy's strings.
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"the names in `{argument}` must be unique. Received {repeated[0]!r} "
            f"more than once in {argument}={tasks!r}"
        )
    return names
