"""Parallel training in worker processes, since small models use only one core each."""

from __future__ import annotations

import contextlib
import logging
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
Result = TypeVar("Result")


class Workers:
    """A context manager of worker processes.

    An error or interrupt inside the context terminates the processes. They also exit
    when the parent process is killed.

    Args:
        processes: number of processes. With 1 and no `prepare`, the work is done in
            the calling process.
        prepare: initializer, called once in each process with `arguments`.
        *arguments: arguments of `prepare`, sent to each process once.
    """

    def __init__(
        self,
        processes: int,
        prepare: Callable[..., None] | None = None,
        *arguments: Any,
    ) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1 or prepare is not None:
            # Forking a process with TensorFlow's threads may deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                processes, context, _initialize, (prepare, arguments)
            )

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """Yield `work(item)` for each item, in the order of completion.

        Raises:
            InputError: if a process dies. Errors of `work` are raised unchanged.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        try:
            with _block_sigint():  # The first `submit` starts the processes.
                futures = [self._pool.submit(work, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died, perhaps out of memory: use fewer workers; "
                "finished runs are kept, and --resume continues from them"
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
def _block_sigint() -> Iterator[None]:
    """Block SIGINT here and in the processes that start inside the context.

    Ctrl-C reaches all processes of a terminal; only the parent handles it, afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialize(
    prepare: Callable[..., None] | None, arguments: tuple[Any, ...]
) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # Needed where `_block_sigint` has no effect (Windows).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prepare is not None:
        prepare(*arguments)


def _exit_with_parent() -> None:
    """Exit when the parent process ends; otherwise the worker would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def use_one_thread() -> None:
    """Make TensorFlow use one thread in this process: runs are then repeatable."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    # TensorFlow warns about retracing, which is expected with many different models.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
