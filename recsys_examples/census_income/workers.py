"""Processes that train, each on one thread, so that a run depends on its seed alone."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from recsys_examples.census_income.features import GROUPS, Splits
from recsys_examples.census_income.results import Job
from recsys_examples.census_income.training import Outcome
from recsys_examples.errors import InputError

_splits: Splits | None = None  # of this process, if it is a worker


class Workers:
    """Does jobs in several processes.

    Args:
        pool: the processes.
    """

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Do the jobs; yield each with its outcome as soon as it is done.

        Raises:
            InputError: if a process was ended from outside.
        """
        waiting = {self._pool.submit(_run, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a training process was ended from outside, perhaps for want of "
                "memory; finished runs are kept, and --resume goes on from them"
            ) from error


@contextmanager
def start_workers(count: int, splits: Splits) -> Iterator[Workers]:
    """Start processes that hold the rows; end them at once if the block fails.

    Args:
        count: number of processes.
        splits: the rows.
    """
    # A fork of a process with TensorFlow's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _begin, (splits,))
    try:
        yield Workers(pool)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _begin(splits: Splits) -> None:
    """Prepare a worker: it holds the rows, has one thread, and lets its parent stop."""
    global _splits
    _splits = splits
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C goes to all processes of a terminal; the parent alone answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    # TensorFlow warns that models differ from each other, which here they should.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Job) -> Outcome:
    from recsys_examples.census_income.models import kind_of
    from recsys_examples.census_income.training import run

    assert _splits is not None, "this process is no worker"
    group = GROUPS[job.group]
    # A trial is chosen by the main task; a model apart for the other says nothing.
    only_main = job.trial is not None and kind_of(job.model).tasks_apart
    tasks = (group.main,) if only_main else group.tasks
    return run(job.model, job.settings, tasks, _splits, job.seed)
