"""Census-Income, the two task groups of the MMoE paper: search, final runs, tables.

python -m recsys_examples.census_income             shared bottom and MMoE, group 1
python -m recsys_examples.census_income --study     all models, both groups
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before TensorFlow and BLAS are loaded, also in the workers: no log messages at
# start-up, and one BLAS thread per worker.
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
from rich.table import Table

from recsys_examples.census_income.columns import OFFICIAL
from recsys_examples.census_income.data import DATA_VARIABLE, Census, load_census
from recsys_examples.census_income.features import GROUPS, NOT_INPUTS, Splits
from recsys_examples.census_income.names import CHOICES, SHARED_BOTTOM
from recsys_examples.command import (
    interrupt_on_sigterm,
    make_console,
    run_command,
    whole_number,
)
from recsys_examples.files import PAGE, RECORD
from recsys_examples.study_report import write_study_report

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
        interrupted="finished runs are kept, and --resume continues from them",
    )


def compare_models(options: argparse.Namespace) -> None:
    """Tune and train all models of the plan; print the tables."""
    started = time.perf_counter()
    console = make_console(170)
    # TensorFlow is imported only after the data was read without errors.
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
    depends_on = _depends_on(splits)
    results = Results(path, depends_on, options.resume)
    tables: list[Table] = []
    findings: list[str] = []
    console.print(
        f"Census-Income, {where}; rows: {len(splits.train):,} training, "
        f"{len(splits.validation):,} validation, {len(splits.test):,} test"
    )
    console.print(
        f"{plan.runs} runs: {plan.trials} search trials and {plan.seeds} seeds for "
        f"each model and group; {len(results)} finished before; results in {path}"
    )
    with (
        Workers(options.workers, prepare, splits) as workers,
        _progress(console) as bar,
    ):
        announce = _announcer(plan, bar, console)
        runner = partial(workers.map, train)
        for group, table in Study(plan, splits, results, runner, announce).run():
            made = found_table(group, table, where), papers_table(group)
            lines = verdict(group, table)
            console.print(made[0])
            for line in lines:
                console.print(line)
            console.print(made[1])
            tables += made
            findings += [f"Group {GROUPS[group].number}: {line}" for line in lines]
    seconds = time.perf_counter() - started
    write_study_report(
        options.out,
        "Census-Income: multi-task models",
        tables,
        findings,
        {"files": where, "plan": asdict(plan), **depends_on, "seconds": round(seconds)},
    )
    console.print(f"{seconds:.0f} s. Results in {path}, a page in {options.out / PAGE}")


def _plan(options: argparse.Namespace) -> Plan:
    from recsys_examples.census_income.study import Plan

    study = options.study
    default_models = CHOICES if study else [SHARED_BOTTOM, "MMoE"]
    return Plan(
        groups=options.groups or (list(GROUPS) if study else ["income"]),
        models=list(dict.fromkeys(options.models or default_models)),
        trials=options.trials or (STUDY_TRIALS if study else TRIALS),
        seeds=options.seeds or (STUDY_SEEDS if study else SEEDS),
        equal_bottom=study,
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
    """Return a callback that shows progress: a bar, or a line per run in a file."""
    task = bar.add_task("runs", total=plan.runs)
    done = 0

    def announce(job: Job, outcome: Outcome, is_new: bool) -> None:
        nonlocal done
        done += 1
        bar.update(task, advance=1, description=str(job))
        if is_new and not console.is_terminal:
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
        description="Compare multi-task layers on Census-Income (KDD): a random search "
        "of equal budget per model, selected on validation, then several seeds.",
    )
    _add_run_options(parser)
    _add_plan_options(parser)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder with census-income.data and census-income.test, or with train.csv "
        f"and test.csv (default: the environment variable {DATA_VARIABLE})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/census_income"),
        help=f"folder of {RESULTS}, {RECORD} and {PAGE}, a page with all of it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the finished runs in the folder; trials, seeds, models "
        "and groups may be added",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1, 256),
        default=2,
        help="number of processes, one thread each (default: %(default)s)",
    )


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study",
        action="store_true",
        help="all models in both groups, and a shared bottom with as many parameters "
        "as the best layer",
    )
    parser.add_argument(
        "--groups", nargs="+", choices=tuple(GROUPS), help="task groups"
    )
    parser.add_argument("--models", nargs="+", choices=CHOICES, help="names of models")
    parser.add_argument(
        "--trials",
        type=whole_number(1, 10_000),
        help="search trials per model and group "
        f"(default: {TRIALS}; study: {STUDY_TRIALS})",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(1, 10_000),
        help="final runs with the settings of the best trial "
        f"(default: {SEEDS}; study: {STUDY_SEEDS})",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31),
        default=0,
        help="seed of the search and of the first final run (default: %(default)s)",
    )


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
