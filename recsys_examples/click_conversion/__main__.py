"""Click and conversion: which model learns both stages best, and where mixtures pay.

python -m recsys_examples.click_conversion                simulator and RAND HIE
python -m recsys_examples.click_conversion map            where do mixtures pay?
python -m recsys_examples.click_conversion --resume       continue an interrupted study
python -m recsys_examples.click_conversion --data kuairand --data-dir DIR

Single-task networks, a shared bottom, MMoE, PLE, ESMM, ESCM2 and AITM of about equal
size are tuned with the same budget, and compared over seeds by paired tests.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before TensorFlow and BLAS are loaded, also in the workers: no log messages at
# start-up, and one BLAS thread per worker.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from recsys_examples.click_conversion.settings import MAP_FACTORS, MODELS, Budget
from recsys_examples.command import (
    interrupt_on_sigterm,
    make_console,
    run_command,
    whole_number,
)
from recsys_examples.errors import InputError
from recsys_examples.files import PAGE, RECORD
from recsys_examples.runs import replaced
from recsys_examples.study_report import write_study_report

if TYPE_CHECKING:
    from recsys_examples.click_conversion.sources import Source
    from recsys_examples.click_conversion.study import Study

RESULTS, TABLES, PICTURE = "results.jsonl", "tables.md", "mixtures.png"
IN_MEMORY = ("simulator", "rand_hie")
LOGS = ("ali_ccp", "kuairand", "aliexpress")
PROFILES = ("default", "full", "tiny")
NAMES = {name.lower().replace(" ", "-"): name for name in MODELS}
_WIDTH = 210


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parsed(arguments)
    return run_command(
        lambda: draw_map(options) if options.command == "map" else compare(options),
        needs="the example's training loop",
        interrupted="finished runs are kept, and --resume continues from them",
    )


def compare(options: argparse.Namespace) -> None:
    """Tune and run all models on the chosen data; print and write the tables."""
    started = time.perf_counter()
    _check_folder(options)
    from recsys_examples.click_conversion import profiles, report, weightings

    weightings.make(options.loss_weighting, 1)  # raises for an unknown name
    profile = profiles.PROFILES[options.profile]
    budget = _budget(options, profile.budget)
    sources = profiles.sources(
        options.data,
        profile.rows,
        options.data_dir,
        options.max_rows,
        options.max_buckets,
    )
    study, depends_on = _run(options, sources, budget)

    console = make_console(_WIDTH)
    tables, lines = [], []
    for source in sources:
        tables += [
            report.settings_table(study, source),
            *report.source_tables(study, source),
        ]
        lines += report.verdict(study, source)
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, markup=False)
    _write_tables(options.out / TABLES, tables, lines)
    title = "Click and conversion: multi-task models"
    write_study_report(options.out, title, tables, lines, depends_on)
    console.print(_finished(started, study, options))


def draw_map(options: argparse.Namespace) -> None:
    """Run shared bottoms and mixtures in all cells of the map; print and plot it."""
    started = time.perf_counter()
    from recsys_examples.click_conversion import regimes, weightings

    weightings.make(options.loss_weighting, 1)
    plan = regimes.PLANS[options.profile]
    factors = [regimes.BY_NAME[name] for name in options.factors]
    cells = regimes.cells(plan.rows, factors)
    budget = _budget(options, plan.budget)
    study, depends_on = _run(options, regimes.sources(cells), budget, map_=True)
    from recsys_examples.click_conversion.pictures import draw

    console = make_console(_WIDTH)
    gains = regimes.gains(study, cells)
    tables = regimes.tables(gains)
    for table in tables:
        console.print(table)
    lines = regimes.rules(gains)
    for line in lines:
        console.print(line, markup=False)
    draw(options.out / PICTURE, gains)
    _write_tables(options.out / TABLES, tables, lines)
    title = "Where mixtures pay: gains over a shared bottom"
    write_study_report(options.out, title, tables, lines, depends_on)
    console.print(_finished(started, study, options))


def _run(
    options: argparse.Namespace,
    sources: list[Source],
    budget: Budget,
    map_: bool = False,
) -> tuple[Study, dict[str, Any]]:
    """Run what is not on disk; return the study and what its results depend on."""
    from recsys_examples.click_conversion.results import Results
    from recsys_examples.click_conversion.settings import BOTTOM, MIXTURES
    from recsys_examples.click_conversion.study import Study

    for source in sources:
        _check_parts(source)
    depends_on = {
        "sources": {source.name: source.identity() for source in sources},
        "budget": {
            name: value for name, value in asdict(budget).items() if name != "seeds"
        },
        "loss_weighting": options.loss_weighting,
        "versions": _versions(),
    }
    results = Results(options.out / RESULTS, depends_on, options.resume)
    models = [BOTTOM, *MIXTURES] if map_ else [NAMES[name] for name in options.models]
    study = Study(sources, models, budget, options.loss_weighting, results)
    console = make_console(_WIDTH)
    with Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("runs", total=study.runs)
        study.run(lambda done: bar.update(task, completed=done), options.workers)
    return study, {**depends_on, "seeds": budget.seeds}


def _check_folder(options: argparse.Namespace) -> None:
    logs = [name for name in options.data if name in LOGS]
    if logs and len(options.data) > 1:
        raise InputError(
            f"--data: must be one of {', '.join(LOGS)} alone, or of "
            f"{', '.join(IN_MEMORY)}; got {' '.join(options.data)}"
        )
    if logs and options.data_dir is None:
        raise InputError(f"--data-dir: must be given with --data {logs[0]}; got none")
    if logs and not options.data_dir.is_dir():
        raise InputError(
            f"--data-dir: must be a folder; got {options.data_dir}, which is not one"
        )
    if not logs and options.data_dir is not None:
        raise InputError(
            f"--data-dir: must be given only with --data {', '.join(LOGS)}; got "
            f"{options.data_dir} with --data {' '.join(options.data)}"
        )


def _check_parts(source: Source) -> None:
    """Read the first batch of each part, for errors before any training."""
    for part in ("train", "validation", "test"):
        try:
            next(iter(source.parts(part, 0)))
        except StopIteration:
            raise InputError(
                f"{source.title}: the part {part!r} must have a row; got none"
            ) from None


def _budget(options: argparse.Namespace, budget: Budget) -> Budget:
    return replace(budget, seeds=options.seeds or budget.seeds, first_seed=options.seed)


def _versions() -> dict[str, str]:
    from recsys_examples.runs import versions

    packages = versions("keras-moe", "keras", "tensorflow", "numpy")
    return {"python": platform.python_version(), **packages}


def _finished(started: float, study: Study, options: argparse.Namespace) -> str:
    seconds = time.perf_counter() - started
    return (
        f"{seconds:.0f} s with {options.workers} workers on {os.cpu_count()} cores; "
        f"{study.runs} runs of {study.seconds:.0f} s in all, some perhaps from before. "
        f"Written to {options.out}"
    )


def _write_tables(path: Path, tables: list[Table], lines: list[str]) -> None:
    """Write the tables as Markdown."""
    text = io.StringIO()
    console = Console(file=text, width=1000, highlight=False)
    for table in tables:
        console.print(f"{table.title}\n", markup=False)
        plain = copy.copy(table)
        plain.title, plain.box = None, box.MARKDOWN
        console.print(plain)
    for line in lines:
        console.print(line, markup=False)
    stripped = [line.rstrip() for line in text.getvalue().splitlines()]
    with replaced(path) as unfinished:
        unfinished.write_text("\n".join(stripped) + "\n")


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    for name in ("data", "models"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    if options.out is None:
        folder = (
            "click_conversion_map" if options.command == "map" else "click_conversion"
        )
        options.out = Path("runs") / folder
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recsys_examples.click_conversion",
        description="Compare multi-task models on click and conversion, or map where "
        "mixtures pay.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("compare", "map"),
        default="compare",
        help="compare the models (default), or draw the map",
    )
    _add_data_options(parser)
    _add_study_options(parser)
    _add_run_options(parser)
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        choices=(*IN_MEMORY, *LOGS),
        default=list(IN_MEMORY),
        help="data to compare on (default: %(default)s)",
    )
    parser.add_argument(
        "--data-dir", type=Path, help=f"folder of the files of {', '.join(LOGS)}"
    )
    parser.add_argument(
        "--max-rows",
        type=whole_number(1, 10**12),
        help="rows of each part of a log to read at most (default: all)",
    )
    parser.add_argument(
        "--max-buckets",
        type=whole_number(2, 1 << 24),
        default=1 << 16,
        help="largest vocabulary size of a category of a log; further values share "
        "indices (default: %(default)s)",
    )


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        choices=tuple(NAMES),
        default=list(NAMES),
        help="models to compare (default: all)",
    )
    parser.add_argument(
        "--factors",
        nargs="+",
        choices=MAP_FACTORS,
        default=list(MAP_FACTORS),
        help="for map: what to vary (default: all)",
    )
    parser.add_argument(
        "--loss-weighting",
        metavar="NAME",
        help="loss weighting or combination of gradients of keras_moe.multitask "
        "(default: the sum of the losses)",
    )
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="default",
        help="size of the study; tiny tests the installation (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(2, 10_000),
        help="runs of each model with its chosen settings (default: by the profile)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 100_000),
        default=Budget().first_seed,
        help="seed of the first run (default: %(default)s)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of {RESULTS}, {TABLES}, {RECORD}, {PAGE} (a page with all of "
        f"it) and, for map, {PICTURE} "
        "(default: runs/click_conversion, runs/click_conversion_map)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the study in the folder; seeds and models may be added",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1, 256),
        default=2,
        help="number of processes, one thread each; it does not affect the results "
        "(default: %(default)s)",
    )


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
