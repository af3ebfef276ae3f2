"""What a process that trains does: it holds the rows and has one thread.

With one thread, a run depends on its seed alone.
"""

from __future__ import annotations

import logging
import os

from recsys_examples.census_income.features import GROUPS, Splits
from recsys_examples.census_income.results import Job
from recsys_examples.census_income.training import Outcome

_splits: Splits | None = None  # of this process, if it is a worker


def prepare(splits: Splits) -> None:
    """Make this process one that trains."""
    global _splits
    _splits = splits
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    # TensorFlow warns that models differ from each other, which here they should.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def train(job: Job) -> tuple[Job, Outcome]:
    """Do a job, in a process that is prepared."""
    from recsys_examples.census_income.models import kind_of
    from recsys_examples.census_income.training import run

    assert _splits is not None, "this process is no worker"
    group = GROUPS[job.group]
    # A trial is chosen by the main task; a model apart for the other says nothing.
    only_main = job.trial is not None and kind_of(job.model).tasks_apart
    tasks = (group.main,) if only_main else group.tasks
    return job, run(job.model, job.settings, tasks, _splits, job.seed)
