"""Processes that work at the same time: a run of small models fills one core alone."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from recsys_examples.errors import InputError

Item = TypeVar("Item")
Made = TypeVar("Made")


class Workers:
    """A number of processes, or this one alone. A context manager.

    Leaving it by an error, an interrupt among them, ends the processes at once.

    Args:
        processes: how many. With 1 the work is done in this process.
    """

    def __init__(self, processes: int) -> None:
        self._pool: Any = None
        if processes > 1:
            # TensorFlow does not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _die_quietly)

    def map(
        self, work: Callable[[Item], Made], items: Iterable[Item]
    ) -> Iterator[Made]:
        """Yield what `work` makes of each item, in the order of completion.

        Raises:
            InputError: if a process dies, or what `work` raises.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        try:
            futures = [self._pool.submit(work, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process died, perhaps for want of memory: --processes 1 needs "
                "least, and --resume goes on"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()


def _die_quietly() -> None:
    """An interrupt from the keyboard reaches every process; one may speak of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
