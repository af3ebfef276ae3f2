"""A multi-task ranker for MovieLens: training, evaluation, export, serving.

python -m recsys_examples.movielens               train, evaluate and export
python -m recsys_examples.movielens recommend     recommend with an exported model
python -m recsys_examples.movielens serve         the same on a page
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before TensorFlow and BLAS are loaded: no log messages at start-up, and no BLAS
# threads beside those of implicit.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich.console import Console
from rich.table import Table

from recsys_examples.command import interrupt_on_sigterm, make_console, run_command
from recsys_examples.errors import InputError
from recsys_examples.files import EXPERTS, PAGE, RECORD
from recsys_examples.movielens.command import (
    add_recommend,
    add_run_arguments,
    depends_on,
    print_list,
    print_order_warnings,
    read_data,
    run_metadata,
)
from recsys_examples.movielens.serve_command import add_serve
from recsys_examples.study_report import write_study_report

if TYPE_CHECKING:
    from recsys_examples.movielens.data import MovieLens
    from recsys_examples.movielens.model import Settings
    from recsys_examples.movielens.pipeline import Outcome, Windows

METRICS = {
    "ndcg@10": "NDCG@10",
    "recall@10": "Recall@10",
    "coverage@10": "coverage@10",
    "watch_auc": "watch: AUC",
    "watch_log_loss": "watch: log loss",
    "watch_gauc": "watch: GAUC",
    "like_auc": "like: AUC",
    "like_log_loss": "like: log loss",
    "like_gauc": "like: GAUC",
    "rating_rmse": "rating: RMSE",
}
BODIES = {"mmoe": "MMoE", "shared_bottom": "shared bottom", "moe": "sparse MoE"}
OPTIMIZERS = ("adam", "fused_adam", "lazy_adam", "rowwise_adagrad")
OUT = "runs/movielens"
QUICK = "A quick run, to test the installation: figures mean nothing."
# Seconds for tuning ALS on other data than the default: in a run, and with --quick.
ALS_BUDGET, QUICK_ALS_BUDGET = 180.0, 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(
        lambda: options.run(options),
        needs="the pipeline (string features, SavedModel)",
        interrupted="unfinished results were discarded; --resume goes on from the last "
        "backup of the training, if it had one",
    )


def train(options: argparse.Namespace) -> None:
    """Train and evaluate a ranker and the baselines; write the run's folder."""
    from recsys_examples.backups import backup_folder
    from recsys_examples.runs import run_folder

    started = time.perf_counter()
    console = make_console()
    with (
        backup_folder(options.out, depends_on(options), options.resume) as backups,
        run_folder(options.out) as (folder, final),
    ):
        # TensorFlow is imported only after the data was read and the output folder
        # created, so that errors in either are raised at once.
        data = read_data(options)
        from keras_moe import report
        from recsys_examples.movielens import tuning
        from recsys_examples.movielens.pipeline import run_ranker
        from recsys_examples.runs import write_json
        from recsys_examples.tables import results_table

        windows, settings, warnings = _prepare(data, options, console)
        console.print("Training: number of epochs on validation, then the final model.")
        # A progress bar in a terminal, one line per epoch in a file.
        verbose = 1 if sys.stdout.isatty() else 2
        outcome = run_ranker(
            windows,
            settings,
            seed=options.seed,
            jit_compile=options.jit_compile,
            verbose=verbose,
            backups=backups,
            experts=folder / EXPERTS,
        )
        console.print("Baselines: popularity and ALS.")
        budget_s = QUICK_ALS_BUDGET if options.quick else ALS_BUDGET
        tuned = tuning.als_for(windows, data.name, options.seed, budget_s)
        console.print(tuning.als_summary(tuned, budget_s))
        results = {
            BODIES[settings.body]: [outcome.metrics],
            **_baseline_results(windows, tuned.settings, options.seed),
        }
        _write_models_and_plots(folder, windows, outcome)
        record = _record(options, data.name, settings, outcome, results)
        record["als"] = tuning.als_record(tuned)
        record["warnings"] = warnings
        record["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / RECORD, record)
        report(folder, title=f"{data.name}: run {final.name}")
    title = f"{data.name}: test window, seed {options.seed}"
    console.print(results_table(title, results, METRICS))
    console.print(f"{record['seconds']:.0f} s. Written to {final}")
    console.print(
        f"Try: python -m recsys_examples.movielens recommend --user "
        f"{windows.before_test.user_ids[-1]} --model {final}"
    )


def _baseline_results(
    windows: Windows, als_settings: Any, seed: int
) -> dict[str, list[dict[str, float]]]:
    """Evaluate ALS and popularity on the test window."""
    from recsys_examples.movielens import baselines
    from recsys_examples.movielens.ranking import rank

    watched = windows.before_test.matrix(len(windows.catalogue))
    als = baselines.als(watched, als_settings, seed)
    return {
        "ALS": [rank(als, windows.test_task)],
        "popularity": [rank(baselines.popularity(watched), windows.test_task)],
    }


def _write_models_and_plots(folder: Path, windows: Windows, outcome: Outcome) -> None:
    """Write the Keras file, the SavedModel and the plots of a run."""
    from recsys_examples.movielens import pictures
    from recsys_examples.movielens.serving import export_saved_model

    ranker = outcome.fit.ranker
    ranker.pairs.save(folder / "model.keras")
    export_saved_model(
        ranker, windows.before_test, windows.catalogue, folder / "saved_model"
    )
    pictures.draw(
        folder,
        outcome.curves,
        ranker,
        windows.before_test,
        windows.catalogue,
        outcome.rows,
        outcome.predictions,
    )


def study(options: argparse.Namespace) -> None:
    """Run all models over several seeds; results on disk are reused."""
    data = read_data(options)
    from recsys_examples.runs import make_folder

    console = make_console()
    windows, settings, warnings = _prepare(data, options, console)
    results = options.out / "study"
    make_folder(results)
    kind, table, findings = _studied(windows, settings, options, data.name, console)
    console.print(table)
    for line in findings:
        console.print(line, markup=False)
    folder = results / kind
    make_folder(folder)
    record = {
        **run_metadata(options, data.name, settings, "implicit"),
        "warnings": [QUICK] * options.quick + warnings,
    }
    del record["seed"]  # A study has seeds from 0.
    title = f"MovieLens: study of {kind}"
    write_study_report(folder, title, [table], findings, record)
    console.print(f"Results in {results}, a page in {folder / PAGE}", soft_wrap=True)


def _studied(
    windows: Windows,
    settings: Settings,
    options: argparse.Namespace,
    name: str,
    console: Console,
) -> tuple[str, Table, list[str]]:
    """Return what is compared, the table, and the differences in words."""
    from recsys_examples.movielens.body_study import bodies_table, run_bodies
    from recsys_examples.movielens.optimizer_study import (
        optimizers_table,
        run_optimizers,
    )
    from recsys_examples.movielens.study import run_study
    from recsys_examples.movielens.tuned import comparisons
    from recsys_examples.tables import results_table

    seeds, folder, announce = options.seeds, options.out / "study", console.print
    title = f"{name}: test window, {seeds} seeds"
    if options.body == "moe":
        bodies = run_bodies(windows, settings, seeds, folder, name, announce)
        metrics = {body: studied.metrics for body, studied in bodies.items()}
        first, *others = metrics
        pairs = [(first, other) for other in others]
        return "bodies", bodies_table(title, bodies), comparisons(metrics, pairs)
    if options.optimizer:
        names = list(dict.fromkeys(options.optimizer))  # each once
        found = run_optimizers(windows, settings, names, seeds, folder, name, announce)
        metrics = {optimizer: studied.metrics for optimizer, studied in found.items()}
        first, *others = names
        pairs = [(other, first) for other in others]
        table = optimizers_table(title, found)
        return "optimizers", table, comparisons(metrics, pairs)
    results = run_study(windows, settings, seeds, folder, name, announce)
    title += ", mean ± standard deviation"
    # The others have no seed.
    pairs = [("MMoE", other) for other in ("shared bottom", "single-task", "ALS")]
    table = results_table(title, results, METRICS)
    return "models", table, comparisons(results, pairs)


def recommend(options: argparse.Namespace) -> None:
    """Print the recommendations of a run's SavedModel for a user."""
    from recsys_examples.runs import find_saved_model

    find_saved_model(options.model)
    if options.explain:
        from recsys_examples.movielens.explain_command import recommend_explained

        recommend_explained(options)
        return
    import tensorflow as tf

    from recsys_examples.movielens.fusion import SCORE_MEANING
    from recsys_examples.movielens.serving import load_recommender

    signature = load_recommender(options.model, ("user_id", "k"))
    try:
        answer = signature(
            user_id=tf.constant([options.user], tf.int64), k=tf.constant(options.k)
        )
    except tf.errors.InvalidArgumentError as error:
        reason = re.search(r"\bk`? (must [^.:\]]*)", error.message)
        raise InputError(
            f"--k {options.k}: {f'k {reason[1]}' if reason else error.message}"
        ) from error
    print_list(options.user, answer, options.k, SCORE_MEANING)


def _prepare(
    data: MovieLens, options: argparse.Namespace, console: Console
) -> tuple[Windows, Settings, list[str]]:
    """Split the data and print its sizes; return it with settings and warnings."""
    from recsys_examples.movielens.model import Settings
    from recsys_examples.movielens.pipeline import make_windows

    settings = Settings(body=options.body)
    if options.optimizer and not options.study:
        settings = replace(settings, optimizer=options.optimizer[0])
    if options.quick:
        settings = replace(settings, max_epochs=2)
        console.print(QUICK)
    windows = make_windows(data)
    console.print(
        f"{data.name}: {len(data.ratings):,} ratings of {len(windows.catalogue):,} "
        f"movies by {len(windows.train.user_ids):,} users; split by time within each "
        f"user: {len(windows.train.movies):,} train, "
        f"{len(windows.before_test.movies) - len(windows.train.movies):,} validation, "
        f"{len(windows.test.movies):,} test; "
        f"{len(windows.test_task.users):,} test users."
    )
    return windows, settings, print_order_warnings(console, data)


def _record(
    options: argparse.Namespace, name: str, settings: Any, outcome: Any, results: Any
) -> dict[str, Any]:
    """Return the results with the metadata of the run."""
    import resource

    return {
        **run_metadata(options, name, settings, "implicit"),
        "epochs": outcome.fit.epochs,
        "results": {model: runs[0] for model, runs in results.items()},
        "curves": outcome.curves,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recsys_examples.movielens",
        description="Train, evaluate and export a multi-task ranker for MovieLens.",
    )
    parser.set_defaults(run=_train_or_study)
    add_run_arguments(
        parser,
        OUT,
        "compare with a shared bottom, single-task models, ALS and item-kNN",
    )
    parser.add_argument(
        "--body",
        choices=tuple(BODIES),
        default="mmoe",
        help="layer shared by the tasks (default: %(default)s); --study --body moe "
        "compares the sparse mixture with dense layers instead of the models",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        nargs="+",
        metavar="NAME",
        help="optimizer of the ranker: "
        f"{', '.join(OPTIMIZERS)} (default: adam); with --study, compare those named, "
        "each with its learning rate tuned, instead of the models",
    )
    parser.add_argument(
        "--jit-compile",
        action="store_true",
        help="compile the training step with XLA",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training of an interrupted run with the same options; "
        "a study goes on by itself",
    )
    commands = parser.add_subparsers(title="commands")
    add_recommend(commands, recommend, OUT, 2**31 - 1).add_argument(
        "--explain",
        action="store_true",
        help="also print what each expert contributes to the scores of each movie",
    )
    add_serve(commands, OUT)
    return parser


def _train_or_study(options: argparse.Namespace) -> None:
    if options.study and options.body == "shared_bottom":
        raise InputError(
            "--body shared_bottom cannot be used with --study, which runs it anyway"
        )
    if options.study and options.body == "moe" and options.optimizer:
        raise InputError("--body moe cannot be used with --study and --optimizer")
    if options.study and options.jit_compile:
        raise InputError("--jit-compile cannot be used with --study")
    if options.study and options.resume:
        raise InputError(
            "--resume cannot be used with --study, which always goes on from its files"
        )
    if not options.study and len(options.optimizer or ()) > 1:
        raise InputError("--optimizer must be one name without --study")
    (study if options.study else train)(options)


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
