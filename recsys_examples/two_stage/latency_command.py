"""The command `latency`: of the models of a run, or by size of a grown catalogue."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_examples.command import make_console, number, whole_number
from recsys_examples.errors import InputError
from recsys_examples.files import RECORD
from recsys_examples.movielens.command import run_metadata
from recsys_examples.two_stage.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from recsys_examples.movielens.pipeline import Windows

SAVED_MODELS = {
    "two stages": "saved_model",
    "first example": "full_catalogue",
    "its ranker on all": "ranker_of_all",
}
LATENCY = {
    "p50_ms": "one user, p50 (ms)",
    "p99_ms": "one user, p99 (ms)",
    "batch_ms": "64 users, median (ms)",
    "users_per_second": "users per second, batches of 64",
}
# The data, as `__main__` prepares it for a run.
Prepare = Callable[[argparse.Namespace, "Console"], tuple["Windows", Settings, str]]


def add_latency(commands: Any, out: str, prepare: Prepare) -> None:
    """Add the command; `prepare` reads the data of `--catalogue`."""
    parser = commands.add_parser(
        "latency", help="measure the latency of the models of a run, or by size"
    )
    parser.set_defaults(run=lambda options: latency(options, prepare))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help=f"folder of a run: {out}/...")
    what.add_argument(
        "--catalogue",
        type=whole_number(10, 10**7),
        nargs="+",
        metavar="MOVIES",
        help="sizes of a synthetic catalogue, grown from that of the data; models are "
        "trained for a short time",
    )
    parser.add_argument(
        "--calls",
        type=whole_number(10, 10**6),
        default=300,
        help="number of calls with one user, with --model (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=number(0, 3600),
        default=3.0,
        help="time per model, with --catalogue (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        nargs="+",
        default=[1, 2],
        help="numbers of TensorFlow threads (default: 1 2)",
    )


def latency(options: argparse.Namespace, prepare: Prepare) -> None:
    """Measure the latency of the models of a run, or by size of the catalogue."""
    if options.catalogue:
        _by_size(options, prepare)
    else:
        _of_run(options)


def _of_run(options: argparse.Namespace) -> None:
    from recsys_examples.runs import find_saved_model, write_json
    from recsys_examples.tables import results_table
    from recsys_examples.two_stage.latency import measure_latency

    find_saved_model(options.model)
    folders = _folders(options.model)
    users = _users_of(options.model)
    console = make_console()
    found = {}
    for threads in options.threads:
        found[threads] = measure_latency(folders, users, threads, options.calls)
        table = {name: [figures] for name, figures in found[threads].items()}
        console.print(results_table(f"{threads} thread(s)", table, LATENCY))
        for name, figures in found[threads].items():
            share = found[threads]["two stages"]["batch_ms"] / figures["batch_ms"]
            if name != "two stages":
                console.print(f"64 users: {share:.2f} of the time of {name}")
    write_json(options.model / "latency.json", found)


def _folders(model: Path) -> dict[str, Path]:
    """Return the folders of the SavedModels of a run, by name."""
    folders = {
        name: model / folder
        for name, folder in SAVED_MODELS.items()
        if (model / folder).is_dir()
    }
    if "two stages" not in folders:
        raise InputError(f"{model}: not a run: found no {SAVED_MODELS['two stages']}")
    return folders


def _users_of(model: Path) -> list[int]:
    """Return the ids of the test users of a run."""
    from recsys_examples.runs import read_json

    path = model / RECORD
    users = read_json(path, "give the folder of another run").get("users")
    if (
        not isinstance(users, list)
        or not users
        or not all(type(user) is int and 0 <= user < 2**63 for user in users)
    ):
        raise InputError(
            f"{path}: not the metrics of a run of this example: `users` must be a list "
            "of user ids"
        )
    return users


def _by_size(options: argparse.Namespace, prepare: Prepare) -> None:
    """Train, grow, export and measure; write the run's folder."""
    import tempfile

    from recsys_examples.runs import run_folder, write_json
    from recsys_examples.two_stage import scale, scale_report

    console = make_console()
    with run_folder(options.out) as (folder, final):
        windows, settings, name = prepare(options, console)
        settings = replace(settings, stack="keras-rs")
        trained = scale.Trained(windows, settings, options.seed)
        found: dict[int, dict[int, Any]] = {}
        for size in sorted(set(options.catalogue)):
            console.print(f"{size:,} movies")
            with tempfile.TemporaryDirectory() as models:
                scale.prepare(trained, size, Path(models))
                found[size] = {
                    threads: scale.measure(Path(models), threads, options.seconds)
                    for threads in options.threads
                }
        scale_report.draw(folder / "catalogue.png", found)
        text = scale_report.table(found)
        (folder / "latency.md").write_text(text)
        lines = scale_report.summary(found)
        write_json(
            folder / "latency.json",
            {
                **run_metadata(options, name, settings, "keras-rs", "faiss-cpu"),
                "found": found,
                "summary": lines,
            },
        )
    console.print(text, markup=False, soft_wrap=True)
    for line in lines:
        console.print(line)
    console.print(f"Written to {final}")
