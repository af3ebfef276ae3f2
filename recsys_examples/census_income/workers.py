"""The worker processes: each has a copy of the rows and uses one thread.

With one thread, runs are deterministic given the seed.
"""

from __future__ import annotations

from recsys_examples.census_income.features import GROUPS, Splits
from recsys_examples.census_income.results import Job
from recsys_examples.census_income.training import Outcome
from recsys_examples.workers import use_one_thread

_splits: Splits | None = None  # set by `prepare` in a worker process


def prepare(splits: Splits) -> None:
    """Set up this process as a worker."""
    global _splits
    _splits = splits
    use_one_thread()


def train(job: Job) -> tuple[Job, Outcome]:
    """Run a job. `prepare` must have been called in this process."""
    from recsys_examples.census_income.models import kind_of
    from recsys_examples.census_income.training import run

    assert _splits is not None, "call `prepare` first"
    group = GROUPS[job.group]
    # Trials are selected by the main task: the auxiliary model need not be trained.
    only_main = job.trial is not None and kind_of(job.model).tasks_apart
    tasks = (group.main,) if only_main else group.tasks
    return job, run(job.model, job.settings, tasks, _splits, job.seed)
