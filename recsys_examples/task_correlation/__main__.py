"""The MMoE paper's synthetic study: the effect of task correlation on four models.

python -m recsys_examples.task_correlation             the study
python -m recsys_examples.task_correlation --resume    continue an interrupted study

Two regression tasks of correlation p are learned by a shared bottom, OMoE, MMoE and PLE
of equal size, in many runs; the paper's claims are then checked (Ma et al. 2018,
https://doi.org/10.1145/3219819.3220007, sections 3 and 5).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before TensorFlow is loaded: no log messages at start-up.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from recsys_examples.command import (
    interrupt_on_sigterm,
    make_console,
    number,
    run_command,
    whole_number,
)
from recsys_examples.files import PAGE, RECORD
from recsys_examples.task_correlation.settings import MODELS, Recipe, Settings

if TYPE_CHECKING:
    from recsys_examples.task_correlation.claims import Claim, Losses
    from recsys_examples.task_correlation.study import Study

RESULTS, PICTURE = "results.jsonl", "task_correlation.png"
NAMES = {name.lower().replace(" ", "-"): name for name in MODELS}
QUICK = {
    "runs": 2,
    "correlations": [0.0, 1.0],
    "steps": 200,
    "learning_rates": [0.01],
    "processes": 1,  # each process compiles, which takes most of the time
}
QUICK_ROWS = 16_384


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parsed(arguments)
    return run_command(
        lambda: study(options),
        needs="the study's training loop",
        interrupted="finished runs are kept, and --resume continues from them",
    )


def study(options: argparse.Namespace) -> None:
    """Run the missing runs of the study; print, plot and write the results."""
    started = time.perf_counter()
    settings = _settings(options)
    # Errors in an existing results file are raised before TensorFlow is loaded.
    from recsys_examples.task_correlation.results import ResultsFile

    depends_on = {**asdict(settings), "versions": _versions()}
    depends_on |= depends_on.pop("recipe")
    file = ResultsFile(options.out / RESULTS, depends_on, options.resume)

    from keras_moe import report
    from recsys_examples.runs import write_json
    from recsys_examples.task_correlation.claims import check_claims
    from recsys_examples.task_correlation.models import equal_widths
    from recsys_examples.task_correlation.pictures import draw
    from recsys_examples.task_correlation.study import Study

    console = make_console()
    if options.quick:
        console.print("A quick run, to test the installation: figures mean nothing.")
    every_width = equal_widths(settings.recipe.dimension)
    widths = {NAMES[name]: every_width[NAMES[name]] for name in options.models}
    sizes = _sizes(widths, settings.recipe.dimension, console)
    work = Study(settings, widths, options.correlations, options.runs, file)
    _run(work, options.processes, console)

    claims = check_claims(work.losses())
    draw(options.out / PICTURE, work.losses())
    record = {
        **_record(options, settings, work, claims),
        "sizes": sizes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(options.out / RECORD, record)
    report(options.out, title="Multi-task models by the correlation of the tasks")
    _print_results(record, work.losses(), console)
    _print_claims(claims, console)
    console.print(f"{record['seconds']:.0f} s. Written to {options.out}")


def _sizes(
    widths: dict[str, int], dimension: int, console: Console
) -> dict[str, dict[str, int]]:
    """Return the width and the parameters of each model, and print them."""
    from recsys_examples.task_correlation.models import parameters

    sizes = {}
    for model, width in widths.items():
        count = parameters(model, width, dimension)
        console.print(f"{model}: {count:,} parameters, width {width}")
        sizes[model] = {"width": width, "parameters": count}
    return sizes


def _run(work: Study, processes: int, console: Console) -> None:
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=work.trainings)
        work.run(lambda done: bar.update(task, completed=done), processes)


def _record(
    options: argparse.Namespace, settings: Settings, work: Study, claims: list[Claim]
) -> dict[str, Any]:
    """Return the results with the arguments, settings and versions they depend on."""
    from recsys_examples.task_correlation.claims import mean, standard_deviation

    def cell(model: str, p: float, losses: Any) -> dict[str, Any]:
        return {
            "learning_rate": work.learning_rate(model, p),
            "mean": float(mean(losses)),
            "standard_deviation": float(standard_deviation(losses)),
            "losses": losses.tolist(),
        }

    return {
        "arguments": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
        },
        "seed": options.seed,
        "settings": asdict(settings),
        "versions": _versions(),
        "results": {
            model: {_shown(p): cell(model, p, losses) for p, losses in found.items()}
            for model, found in work.losses().items()
        },
        "claims": [asdict(claim) for claim in claims],
    }


def _print_results(record: dict[str, Any], losses: Losses, console: Console) -> None:
    from recsys_examples.tables import results_table

    for model, found in record["results"].items():
        rates = (f"{cell['learning_rate']:g} at p = {p}" for p, cell in found.items())
        console.print(f"{model}: learning rate {', '.join(rates)}")
    names = [_shown(p) for p in record["arguments"]["correlations"]]
    by_run = {}
    for model, found in losses.items():
        runs = zip(*found.values(), strict=True)
        by_run[model] = [dict(zip(names, run, strict=True)) for run in runs]
    title = f"final loss, {record['arguments']['runs']} runs, mean ± standard deviation"
    console.print(results_table(title, by_run, {p: f"p = {p}" for p in names}))


def _shown(correlation: float) -> str:
    return f"{correlation:.15g}"  # all digits: the keys must be unique


def _print_claims(claims: list[Claim], console: Console) -> None:
    console.print(
        "The paper's claims (PLE is later than the paper and not part of them); "
        "[..]: 95% interval of a paired bootstrap"
    )
    from recsys_examples.task_correlation.claims import MIN_RUNS

    verdicts = {
        True: "true",
        False: "false",
        None: f"not checked (requires {MIN_RUNS} runs at each correlation)",
    }
    for place, claim in enumerate(claims, start=1):
        console.print(f"{place}. {claim.text}: {verdicts[claim.holds]}")
        for line in (f"rule: {claim.rule}", *claim.evidence):
            console.print(f"   {line}", markup=False)


def _versions() -> dict[str, str]:
    import platform

    from recsys_examples.runs import versions

    return {
        "python": platform.python_version(),
        **versions("keras-moe", "keras", "tensorflow", "numpy"),
    }


def _settings(options: argparse.Namespace) -> Settings:
    recipe = Recipe(scale=options.scale, sines=options.sines, noise=options.noise)
    if options.quick:
        recipe = replace(recipe, train_rows=QUICK_ROWS)
    return Settings(
        recipe,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rates=tuple(options.learning_rates),
        seed=options.seed,
    )


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick:  # other options take precedence over those of --quick
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    for name in ("correlations", "models", "learning_rates"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recsys_examples.task_correlation",
        description="Compare multi-task models on two tasks of given correlation.",
    )
    _add_study_options(parser)
    _add_training_options(parser)
    _add_data_options(parser)
    _add_run_options(parser)
    return parser


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        type=whole_number(2, 100_000),
        default=30,
        help="runs per model and correlation (default: %(default)s)",
    )
    parser.add_argument(
        "--correlations",
        type=number(-1, 1),
        nargs="+",
        default=[0.0, 0.5, 1.0],
        metavar="P",
        help="cosines between the weight vectors of the tasks (default: 0 0.5 1)",
    )
    parser.add_argument(
        "--models",
        choices=tuple(NAMES),
        nargs="+",
        default=list(NAMES),
        help="models to compare (default: all)",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    settings = Settings()
    parser.add_argument(
        "--steps",
        type=whole_number(1, 10**9),
        default=settings.steps,
        help="training steps per run (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1, QUICK_ROWS),
        default=settings.batch_size,
        help="rows per batch (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rates",
        type=number(1e-9, 10),
        nargs="+",
        default=list(settings.learning_rates),
        metavar="RATE",
        help="grid of learning rates of Adam, tuned per model and correlation; a "
        "single value is not tuned "
        f"(default: {' '.join(map(str, settings.learning_rates))})",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=settings.seed,
        help="seed of the data and weights of all runs (default: %(default)s)",
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    recipe = Recipe()
    parser.add_argument(
        "--scale",
        type=number(0, 1000),
        default=recipe.scale,
        help="norm c of the weight vectors of the tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--sines",
        type=whole_number(0, 1000),
        default=recipe.sines,
        help="number m of sine terms in a label (default: %(default)s)",
    )
    parser.add_argument(
        "--noise",
        type=number(0, 1000),
        default=recipe.noise,
        help="standard deviation of the label noise (default: %(default)s)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=whole_number(1, 256),
        default=min(os.cpu_count() or 1, 4),
        help="number of parallel processes, of 1.4 GiB of memory each; it does not "
        "affect the results (default: the number of cores, at most 4: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/task_correlation"),
        help=f"folder of {RESULTS}, {RECORD}, {PICTURE} and {PAGE}, a page with "
        "all of it (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the study in the folder; runs, correlations and models may be "
        "added",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK['runs']} runs of {QUICK['steps']} steps, to test the "
        "installation",
    )


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
