"""Processes that work at the same time: a run of small models fills one core alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
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

    Leaving it by an error, an interrupt among them, ends the processes at once. They
    also end when this process is killed.

    Args:
        processes: how many. With 1, and nothing to prepare, the work is done in this
            process.
        prepare: called in each process before it works, with `arguments`.
        *arguments: what is sent to each process, once.
    """

    def __init__(
        self,
        processes: int,
        prepare: Callable[..., None] | None = None,
        *arguments: Any,
    ) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1 or prepare is not None:
            # A fork of a process with TensorFlow's threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                processes, context, _begin, (prepare, arguments)
            )

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
            with _deaf_to_ctrl_c():  # The first of them starts the processes.
                futures = [self._pool.submit(work, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process died, perhaps for want of memory: fewer processes need "
                "less; finished runs are kept, and --resume goes on from them"
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


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let processes that start here ignore Ctrl-C from their first moment.

    Ctrl-C goes to all processes of a terminal; the parent alone answers, afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Also where `_deaf_to_ctrl_c` can do nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prepare is not None:
        prepare(*arguments)


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
