"""Census-Income, the MMoE paper's two groups of tasks: search, runs, tables.

python -m recsys_examples.census_income             shared bottom against MMoE, group 1
python -m recsys_examples.census_income --study     all models, both groups
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before TensorFlow and BLAS are loaded, here and in the workers: less start-up chatter,
# and no threads beside those of the workers.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from recsys_examples.census_income.columns import OFFICIAL
from recsys_examples.census_income.data import DATA_VARIABLE, Census, load_census
from recsys_examples.census_income.features import GROUPS, NOT_INPUTS, Splits
from recsys_examples.census_income.names import CHOICES, SHARED_BOTTOM
from recsys_examples.command import (
    end_as_interrupted,
    make_console,
    run_command,
    whole_number,
)

if TYPE_CHECKING:
    from recsys_examples.census_income.results import Job
    from recsys_examples.census_income.study import Announce, Plan
    from recsys_examples.census_income.training import Outcome

RESULTS = "results.jsonl"
TRIALS, SEEDS = 5, 3
STUDY_TRIALS, STUDY_SEEDS = 10, 10


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(
        lambda: compare_models(options),
        needs="the example",
        interrupted="finished runs are kept, and --resume goes on from them",
    )


def compare_models(options: argparse.Namespace) -> None:
    """Search and run all models of the plan; print the tables."""
    started = time.perf_counter()
    console = make_console(170)
    # TensorFlow is imported when it is known that the data can be read.
    census = load_census(options.data_dir)
    from recsys_examples.census_income.features import make_splits
    from recsys_examples.census_income.report import (
        found_table,
        papers_table,
        verdict,
    )
    from recsys_examples.census_income.results import Results
    from recsys_examples.census_income.study import Study
    from recsys_examples.census_income.workers import prepare, train
    from recsys_examples.workers import Workers

    plan = _plan(options)
    splits = make_splits(census)
    where = _where(census)
    path = options.out / RESULTS
    results = Results(path, _depends_on(splits), options.resume)
    console.print(
        f"Census-Income, {where}; {len(splits.train):,} rows to train, "
        f"{len(splits.validation):,} to choose, {len(splits.test):,} to report"
    )
    console.print(
        f"{plan.runs} runs, for each model and group {plan.trials} of the search and "
        f"{plan.seeds} by seed; {len(results)} runs at hand; results in {path}"
    )
    with (
        Workers(options.workers, prepare, splits) as workers,
        _progress(console) as bar,
    ):
        announce = _announcer(plan, bar, console)
        runner = partial(workers.map, train)
        for group, table in Study(plan, splits, results, runner, announce).run():
            console.print(found_table(group, table, where))
            for line in verdict(group, table):
                console.print(line)
            console.print(papers_table(group))
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s. Results in {path}")


def _plan(options: argparse.Namespace) -> Plan:
    from recsys_examples.census_income.study import Plan

    some = [SHARED_BOTTOM, "MMoE"]
    models = options.models or (CHOICES if options.study else some)
    everything = options.study
    return Plan(
        groups=options.groups or (list(GROUPS) if everything else ["income"]),
        models=list(dict.fromkeys(models)),
        trials=options.trials or (STUDY_TRIALS if everything else TRIALS),
        seeds=options.seeds or (STUDY_SEEDS if everything else SEEDS),
        equal_bottom=everything,
        first_seed=options.seed,
    )


def _where(census: Census) -> str:
    inputs = [name for name in census.columns if name not in NOT_INPUTS]
    return (
        f"{census.name} with {len(census.columns)} of the {len(OFFICIAL)} columns, "
        f"{len(inputs)} of them inputs"
    )


def _depends_on(splits: Splits) -> dict[str, Any]:
    from recsys_examples.runs import versions

    packages = versions("keras-moe", "keras", "tensorflow", "numpy")
    return {
        "data": splits.fingerprint(),
        "versions": {"python": platform.python_version(), **packages},
    }


def _announcer(plan: Plan, bar: Progress, console: Console) -> Announce:
    """Tell of each run by the bar, or by a line where there is no terminal."""
    task = bar.add_task("runs", total=plan.runs)
    done = 0

    def announce(job: Job, outcome: Outcome, just_now: bool) -> None:
        nonlocal done
        done += 1
        bar.update(task, advance=1, description=str(job))
        if just_now and not console.is_terminal:
            validation = outcome.validation[GROUPS[job.group].main]
            console.print(
                f"{job}: validation {validation:.5f}, {outcome.seconds:.0f} s; "
                f"{done} of {plan.runs}"
            )

    return announce


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recsys_examples.census_income",
        description="Compare multi-task layers on Census-Income (KDD): the same random "
        "search for each model, chosen on validation, then several seeds each.",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder with census-income.data and census-income.test, or with train.csv "
        f"and test.csv (default: the one that {DATA_VARIABLE} names)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/census_income"),
        help=f"folder of {RESULTS} (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the runs in the folder; there may be more trials, seeds, "
        "models or groups than there were",
    )
    parser.add_argument(
        "--study",
        action="store_true",
        help="all models in both groups, and a shared bottom of the best layer's size",
    )
    parser.add_argument(
        "--groups", nargs="+", choices=tuple(GROUPS), help="groups of tasks"
    )
    parser.add_argument("--models", nargs="+", choices=CHOICES, help="models by name")
    parser.add_argument(
        "--trials",
        type=whole_number(1, 10_000),
        help=f"of the search, a model (default: {TRIALS}; study: {STUDY_TRIALS})",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(1, 10_000),
        help=f"runs of the best trial (default: {SEEDS}; study: {STUDY_SEEDS})",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31),
        default=0,
        help="of the search, and the first of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1, 256),
        default=2,
        help="processes, of one thread each (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
