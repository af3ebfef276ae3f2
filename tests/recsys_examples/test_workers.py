"""Parallel worker processes, and their exit with the parent process."""

import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys_examples.errors import InputError
from recsys_examples.workers import Workers

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("processes", [1, 2])
def test_all_items_are_done(processes):
    with Workers(processes) as workers:
        assert sorted(workers.map(math.sqrt, [9.0, 1.0, 4.0])) == [1.0, 2.0, 3.0]
        # The workers can be reused, also with an empty list.
        assert list(workers.map(abs, [])) == []
        assert list(workers.map(abs, [-5])) == [5]


def test_work_is_done_in_another_process():
    with Workers(2) as workers:
        (process,) = workers.map(eval, ["__import__('os').getpid()"])
    assert process != os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_are_raised_in_the_parent(processes):
    with pytest.raises(ValueError, match="math domain"), Workers(processes) as all_:
        list(all_.map(math.sqrt, [-1.0]))


def test_a_process_that_dies():
    with (
        pytest.raises(InputError, match="a worker process died"),
        Workers(2) as workers,
    ):
        list(workers.map(os._exit, [1]))


def test_an_interrupt_ends_the_processes():
    def interrupted():
        with Workers(2) as workers:
            for _ in workers.map(time.sleep, [0, 300, 300]):
                raise KeyboardInterrupt

    deadline = time.monotonic() + 60
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


INTERRUPTED_AT_ONCE = """
import math, os, signal, threading
from recsys_examples.workers import Workers

interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
with Workers(2) as workers:
    threading.Timer(0.02, os.killpg, (0, signal.SIGINT)).start()
    print(sorted(workers.map(math.sqrt, [9.0, 4.0])), len(interrupts))
"""


def test_an_interrupt_does_not_reach_a_starting_process():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_ONCE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[2.0, 3.0] 1\n", "")


def prepare(value):
    global _prepared
    _prepared = value


def prepared(_):
    return _prepared


def test_each_process_is_prepared():
    with Workers(1, prepare, 7) as workers:
        assert list(workers.map(prepared, [0, 1])) == [7, 7]
