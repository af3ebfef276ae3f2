"""Census-Income, the MMoE paper's two groups of tasks: search, runs, tables.

python -m recsys_examples.census_income             shared bottom against MMoE, group 1
python -m recsys_examples.census_income --study     all models, both groups
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
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
from recsys_examples.errors import InputError

if TYPE_CHECKING:
    from recsys_examples.census_income.results import Job
    from recsys_examples.census_income.study import Announce, Plan
    from recsys_examples.census_income.training import Outcome

TRIALS, SEEDS = 5, 3
STUDY_TRIALS, STUDY_SEEDS = 14, 10


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        backend = os.environ["KERAS_BACKEND"]
        if backend != "tensorflow":
            raise InputError(
                "the example needs KERAS_BACKEND=tensorflow; the environment has "
                f"KERAS_BACKEND={backend}"
            )
        compare_models(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: finished runs are kept, and --resume goes on from them",
            file=sys.stderr,
        )
        return 130
    return 0


def compare_models(options: argparse.Namespace) -> None:
    """Search and run all models of the plan; print the tables."""
    started = time.perf_counter()
    console = _console()
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
    results = Results(options.out, _depends_on(splits), options.resume)
    console.print(
        f"Census-Income, {where}; {len(splits.train):,} rows to train, "
        f"{len(splits.validation):,} to choose, {len(splits.test):,} to report"
    )
    console.print(
        f"{plan.runs} runs: {plan.trials} trials and {plan.seeds} seeds for each model "
        f"and group; {len(results)} earlier runs at hand; results in {results.path}"
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
    console.print(f"{seconds:.0f} s. Results in {results.path}")


def _plan(options: argparse.Namespace) -> Plan:
    from recsys_examples.census_income.models import MODELS, SHARED_BOTTOM
    from recsys_examples.census_income.study import Plan

    models = options.models or (
        list(MODELS) if options.study else [SHARED_BOTTOM, "MMoE"]
    )
    for model in models:
        if model not in MODELS:
            raise InputError(f"--models: {model!r} is none of {', '.join(MODELS)}")
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


def _console() -> Console:
    # Tables keep their width in a file or a pipe, where there is no terminal to fit.
    return Console(width=None if sys.stdout.isatty() else 170, highlight=False)


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
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up the finished runs that the folder holds",
    )
    parser.add_argument(
        "--study",
        action="store_true",
        help="all models in both groups, and a shared bottom of the best layer's size",
    )
    parser.add_argument(
        "--groups", nargs="+", choices=tuple(GROUPS), help="groups of tasks"
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="models by name")
    parser.add_argument(
        "--trials",
        type=_whole_number(1, 10_000),
        help=f"of the search, a model (default: {TRIALS}; study: {STUDY_TRIALS})",
    )
    parser.add_argument(
        "--seeds",
        type=_whole_number(1, 10_000),
        help=f"runs of the best trial (default: {SEEDS}; study: {STUDY_SEEDS})",
    )
    parser.add_argument(
        "--seed",
        type=_whole_number(0, 2**31),
        default=0,
        help="of the search, and the first of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=_whole_number(1, 256),
        default=2,
        help="processes, of one thread each (default: %(default)s)",
    )
    return parser


def _whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """Make an argument type that takes the whole numbers of a range."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {lowest} to {highest}, not {text!r}"
        )

    return parse


if __name__ == "__main__":
    # A terminated run cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
