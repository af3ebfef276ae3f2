"""Data without a position: what an epoch reads follows from the state at its start."""

from __future__ import annotations

from typing import Any


class EpochData:
    """Reads the batches of an epoch again that were used before the interruption.

    Args:
        data: None if nothing but the global generators decides the order, or an object
            with `get_state()` and `set_state(state)`.

    Raises:
        TypeError: if `data` lacks one of them.
    """

    def __init__(self, data: Any) -> None:
        for method in ("get_state", "set_state"):
            if data is not None and not callable(getattr(data, method, None)):
                raise TypeError(
                    "`data` must be a DatasetPosition, or have the methods get_state() "
                    f"and set_state(state). Received: data={data!r}"
                )
        self._data = data
        self._state: Any = None

    def start_epoch(self) -> None:
        """Remember the state at the start of an epoch."""
        self._state = None if self._data is None else self._data.get_state()

    def advance(self, used: int) -> None:
        """Nothing: `fit` counts the batches of an epoch."""

    def get_state(self, used: int, in_epoch: int) -> Any:
        """Return the state at the start of the epoch."""
        return self._state

    def restore(self, state: Any, used: int, in_epoch: int) -> bool:
        """Set the state; return True: the batches used are to be read again."""
        if self._data is not None:
            self._data.set_state(state)
        self._state = state
        return True
