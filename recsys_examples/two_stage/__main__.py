"""Two-stage recommendation: retrieval, then a multi-task ranker.

python -m recsys_examples.two_stage                train, evaluate and export
python -m recsys_examples.two_stage --study        over several seeds
python -m recsys_examples.two_stage latency        measure latency of exported models,
                                                   or by size of the catalogue
python -m recsys_examples.two_stage recommend      recommend with an exported model
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

# Set before TensorFlow and BLAS are loaded: no log messages, one thread pool.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich.console import Console

from recsys_examples.command import (
    interrupt_on_sigterm,
    make_console,
    run_command,
)
from recsys_examples.errors import InputError
from recsys_examples.files import RECORD
from recsys_examples.movielens.command import (
    add_recommend,
    add_run_arguments,
    depends_on,
    print_list,
    print_order_warnings,
    read_data,
    run_metadata,
)
from recsys_examples.two_stage.latency_command import SAVED_MODELS, add_latency
from recsys_examples.two_stage.settings import LIST_LENGTH, RANKERS, STACKS, Settings

if TYPE_CHECKING:
    from recsys_examples.movielens import model as movielens
    from recsys_examples.movielens import pipeline as movielens_pipeline
    from recsys_examples.movielens.pipeline import Windows
    from recsys_examples.two_stage.pipeline import Outcome

OUT = "runs/two_stage"
METRICS = {
    "ndcg@10": "NDCG@10",
    "ndcg@10 without diversity": "NDCG@10, without diversity",
    "ndcg@10 of retrieval": "NDCG@10, retrieval alone",
    "recall@10": "Recall@10",
    "recall@candidates": "Recall of the candidates",
    "diversity@10": "intra-list diversity",
    "diversity@10 without diversity": "the same, without diversity",
    "diversity@10 of retrieval": "the same, retrieval alone",
    "coverage@10": "coverage@10",
    "coverage@10 without diversity": "the same, without diversity",
    "coverage@10 of retrieval": "the same, retrieval alone",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    hint = (
        "finished seeds are kept, and --study --resume continues from them"
        if getattr(options, "study", False)
        else "unfinished results were discarded; --resume goes on from the last backup "
        "of the training, if it had one"
    )
    return run_command(
        lambda: options.run(options),
        needs="the pipeline (string features, SavedModel)",
        interrupted=hint,
    )


def train(options: argparse.Namespace) -> None:
    """Train the pipeline and the MovieLens example; write the run's folder."""
    from recsys_examples.backups import backup_folder
    from recsys_examples.runs import run_folder

    started = time.perf_counter()
    console = make_console()
    with (
        backup_folder(
            options.out, depends_on(options, "keras-rs"), options.resume
        ) as backups,
        run_folder(options.out) as (folder, final),
    ):
        windows, settings, full, name, warnings = _prepare(options, console)
        from keras_moe import report
        from recsys_examples.runs import write_json
        from recsys_examples.tables import results_table
        from recsys_examples.two_stage import pictures

        outcome = _train_pipeline(
            folder, windows, settings, options.seed, console, backups
        )
        console.print("Training the MovieLens example's ranker, for comparison.")
        compared = _train_full_ranker(folder, windows, full, options.seed, backups)
        _export_ranker_of_all(folder, outcome, len(windows.catalogue))
        pictures.draw(folder, outcome)
        results = {
            "two stages": [outcome.metrics],
            "full catalogue": [compared.metrics],
        }
        record = {
            **_record(options, name, settings),
            "results": {model: runs[0] for model, runs in results.items()},
            "chosen": outcome.chosen,
            "funnel": outcome.funnel,
            "users": windows.before_test.user_ids[windows.test_task.users].tolist(),
            "warnings": warnings,
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(folder / RECORD, record)
        report(folder, title=f"{name}: run {final.name}")
    console.print(
        results_table(f"{name}: test window, seed {options.seed}", results, METRICS)
    )
    console.print(f"{record['seconds']:.0f} s. Written to {final}")
    console.print(
        f"Try: python -m recsys_examples.two_stage recommend --user "
        f"{windows.before_test.user_ids[-1]} --model {final}\n"
        f"     python -m recsys_examples.two_stage latency --model {final}"
    )


def _train_pipeline(
    folder: Path,
    windows: Windows,
    settings: Settings,
    seed: int,
    console: Console,
    backups: Path,
) -> Outcome:
    """Train, evaluate and export both stages."""
    from recsys_examples.two_stage.pipeline import fit_first_stages, run_second_stage
    from recsys_examples.two_stage.serving import export_saved_model

    stages = fit_first_stages(windows, settings, seed, console.print, backups)
    outcome = run_second_stage(windows, stages, settings, seed, console.print, backups)
    export_saved_model(
        outcome.stage,
        outcome.ranker,
        outcome.fusion,
        folder / SAVED_MODELS["two stages"],
    )
    return outcome


def _train_full_ranker(
    folder: Path,
    windows: Windows,
    full: movielens.Settings,
    seed: int,
    backups: Path,
) -> movielens_pipeline.Outcome:
    """Train, evaluate and export the MovieLens example's ranker of all movies."""
    from recsys_examples.movielens.pipeline import run_ranker
    from recsys_examples.movielens.serving import export_saved_model

    outcome = run_ranker(
        windows, full, seed=seed, verbose=0, backups=backups / "full_catalogue"
    )
    export_saved_model(
        outcome.fit.ranker,
        windows.before_test,
        windows.catalogue,
        folder / SAVED_MODELS["first example"],
    )
    return outcome


def _export_ranker_of_all(folder: Path, outcome: Outcome, num_movies: int) -> None:
    """Export the pipeline with all movies as candidates, for the latency benchmark."""
    from recsys_examples.two_stage.first_stage import FirstStage
    from recsys_examples.two_stage.serving import export_saved_model

    stage = outcome.stage
    settings = replace(outcome.settings, candidates=num_movies)
    export_saved_model(
        FirstStage(stage.retrieval, stage.past, stage.catalogue, settings),
        outcome.ranker,
        outcome.fusion,
        folder / SAVED_MODELS["its ranker on all"],
    )


def study(options: argparse.Namespace) -> None:
    """Run the pipelines and the full ranking over several seeds."""
    from recsys_examples.records import RecordsFile

    console = make_console()
    windows, settings, full, name, warnings = _prepare(options, console)
    from recsys_examples.runs import write_json
    from recsys_examples.tables import results_table
    from recsys_examples.two_stage.study import FULL, NAMES, Study, paired

    depends_on = {
        "data": name,
        "ratings": len(windows.before_test.movies) + len(windows.test.movies),
        "settings": asdict(settings),
        "full": asdict(full),
        "versions": _record(options, name, settings)["versions"],
    }
    folder = options.out / "study"
    file = RecordsFile(folder / "results.jsonl", depends_on, options.resume)
    work = Study(windows, settings, full, file)
    work.run(options.seeds, console.print)
    results = work.metrics(options.seeds)
    title = f"{name}: test window, {options.seeds} seeds, mean ± standard deviation"
    console.print(results_table(title, results, METRICS))
    record = {
        **_record(options, name, settings),
        "results": results,
        "warnings": warnings,
    }
    if options.seeds > 1:
        full_ndcg = [m["ndcg@10"] for m in results[FULL]]
        for model in NAMES.values():
            retrieval_ndcg = [m["ndcg@10 of retrieval"] for m in results[model]]
            for what, other in (
                (FULL, full_ndcg),
                ("retrieval alone", retrieval_ndcg),
            ):
                mean, error = paired(results[model], other)
                console.print(
                    f"{model} minus {what}: NDCG@10 {mean:+.4f}, standard error "
                    f"{error:.4f} over seeds"
                )
                record[f"{model} against {what}"] = [mean, error]
    write_json(folder / RECORD, record)
    console.print(f"Written to {folder}")


def recommend(options: argparse.Namespace) -> None:
    """Print the recommendations of a run's SavedModel for a user."""
    from recsys_examples.runs import find_saved_model

    find_saved_model(options.model)
    import tensorflow as tf

    from recsys_examples.movielens.serving import load_recommender
    from recsys_examples.two_stage.fusion import SCORE_MEANING

    signature = load_recommender(options.model, ("user_id",))
    answer = signature(user_id=tf.constant([options.user], tf.int64))
    print_list(options.user, answer, options.k, SCORE_MEANING)


def _prepare(
    options: argparse.Namespace, console: Console
) -> tuple[Windows, Settings, movielens.Settings, str, list[str]]:
    """Read and split the data; return it with the settings.

    Returns:
        The windows, the settings of the pipeline and of the MovieLens example, the
        name of the data set, and the warnings.
    """
    data = read_data(options)
    if options.stack == "tfrs":
        _import_tfrs()
    from recsys_examples.movielens.model import Settings as FullSettings
    from recsys_examples.movielens.pipeline import make_windows
    from recsys_examples.two_stage.first_stage import check_candidates

    settings = Settings(
        stack=options.stack, ranker=options.ranker, candidates=options.candidates
    )
    full = FullSettings()
    if options.quick:
        settings = replace(settings, retrieval_epochs=2, ranker_epochs=3)
        full = replace(full, max_epochs=2)
        console.print("A quick run, to test the installation: figures mean nothing.")
    windows = make_windows(data)
    check_candidates(settings.candidates, len(windows.catalogue))
    console.print(
        f"{data.name}: {len(data.ratings):,} ratings of {len(windows.catalogue):,} "
        f"movies by {len(windows.train.user_ids):,} users; "
        f"{len(windows.test_task.users):,} test users."
    )
    warnings = print_order_warnings(console, data)
    return windows, settings, full, data.name, warnings


def _prepare_latency(
    options: argparse.Namespace, console: Console
) -> tuple[Windows, Settings, str]:
    """Return the windows, the settings and the name of the data."""
    windows, settings, _, name, _ = _prepare(options, console)
    return windows, settings, name


def _import_tfrs() -> None:
    """Import tensorflow-recommenders before anything else uses `tf.keras`."""
    try:
        import recsys_examples.two_stage.tfrs_stack  # noqa: F401
    except ImportError as error:
        raise InputError(f"--stack tfrs: {error}") from error


def _record(options: argparse.Namespace, name: str, settings: Settings) -> dict:
    """Return the arguments, settings and versions that the results depend on."""
    packages = ["keras-rs"]
    if settings.stack == "tfrs":
        packages += ["tensorflow-recommenders", "tf_keras", "scann"]
    return run_metadata(options, name, settings, *packages)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recsys_examples.two_stage",
        description="Retrieval, a multi-task ranker, score fusion and diversity.",
    )
    parser.set_defaults(run=_train_or_study)
    add_run_arguments(parser, OUT, "several seeds, compared with full ranking")
    parser.add_argument(
        "--stack",
        choices=STACKS,
        default="keras-rs",
        help="library of the retrieval stage (default: %(default)s)",
    )
    parser.add_argument(
        "--ranker",
        choices=RANKERS,
        default="mmoe",
        help="multi-task layer of the ranker (default: %(default)s)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=200,
        help="number of movies that are retrieved (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted study, or with the training of an interrupted "
        "run with the same options (the retrieval of --stack tfrs starts again)",
    )
    commands = parser.add_subparsers(title="commands")
    add_recommend(commands, recommend, OUT, LIST_LENGTH)
    add_latency(commands, OUT, _prepare_latency)
    return parser


def _train_or_study(options: argparse.Namespace) -> None:
    if options.study and options.ranker != "mmoe":
        raise InputError("--ranker cannot be used with --study, which compares both")
    (study if options.study else train)(options)


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
