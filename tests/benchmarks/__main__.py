"""The command of the benchmarks.

python -m tests.benchmarks [--profile fast|regular|large] [--only SUITE] [--json FILE]
python -m tests.benchmarks setup [ENVIRONMENT ...]
python -m tests.benchmarks compare OLD.json NEW.json
python -m tests.benchmarks page FILE.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from recsys_examples.command import interrupt_on_sigterm
from tests.benchmarks.cases import PROFILES, SUITES, select
from tests.benchmarks.compare import count, falls
from tests.benchmarks.display import group_table, ratio_text
from tests.benchmarks.environments import ENVIRONMENTS, ROOT, is_current, set_up
from tests.benchmarks.page import PICTURE, markdown
from tests.benchmarks.picture import png
from tests.benchmarks.results import Results, read, write
from tests.benchmarks.timing import measure

COMMANDS = ("run", "setup", "compare", "page")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status.

    Returns:
        0; 1 if a case failed, or a figure fell; 2 if an argument or file is wrong; 130
        if interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["run", *arguments]
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        return options.work(options, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = getattr(options, "json", None)
        note = f": {kept} has the groups that were finished" if kept else ""
        print(f"interrupted{note}", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, and print a table for each group."""
    groups = select(options.only, options.profile)
    results = Results(options.profile)
    if options.json:
        write(results, options.json)  # A file that cannot be written is an error now.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(groups))
        for group in groups:
            rows = measure(
                group,
                PROFILES[options.profile],
                lambda text: progress.update(bar, description=text),
            )
            results.rows += rows
            progress.update(bar, advance=1)
            console.print(group_table(rows))
            if options.json:
                write(results, options.json)
    return int(any(row.status == "failed" for row in results.rows))


def setup(options: argparse.Namespace, console: Console) -> int:
    """Make the environments of the peers."""
    for name in options.environments or ENVIRONMENTS:
        if name not in ENVIRONMENTS:
            known = ", ".join(ENVIRONMENTS)
            raise ValueError(f"environment must be one of {known}; got {name!r}")
        if is_current(name):
            console.print(f"{name}: is there")
            continue
        console.print(f"{name}: installing")
        try:
            set_up(name)
        except subprocess.CalledProcessError as error:
            console.print(f"{name}: {error}")
            return 1
    return 0


def compare(options: argparse.Namespace, console: Console) -> int:
    """Print where this library fell behind."""
    old, new = read(options.old), read(options.new)
    if dict(old.machine) != dict(new.machine):
        console.print(
            "the files are of two machines: ratios may differ for that reason"
        )
    shared = count(old, new)
    if not shared:
        files = f"{options.old} and {options.new}"
        raise ValueError(f"{files} have no measured case of this library in common")
    if old.profile != new.profile:
        console.print(f"the profiles differ: {old.profile} and {new.profile}")
    found = list(falls(old, new))
    for fall in found:
        if fall.after is None:
            console.print(f"{fall.what}: no longer measured, {fall.reason}")
            continue
        before, after = ratio_text(fall.before), ratio_text(fall.after)
        console.print(f"{fall.what}, against {fall.against}: {before} -> {after}")
    console.print(f"falls: {len(found)}; cases: {shared}")
    return int(bool(found))


def page(options: argparse.Namespace, console: Console) -> int:
    """Write the page and its picture."""
    results = read(options.file)
    if not results.rows:
        raise ValueError(f"{options.file} has no results")
    written = {"performance.md": markdown(results).encode(), PICTURE: png(results)}
    for name, content in written.items():
        path = options.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        console.print(f"wrote {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure the library beside its peers. Without a command: run.",
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="measure (the default)")
    command.set_defaults(work=run)
    command.add_argument("--profile", choices=PROFILES, default="regular")
    command.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="SUITE[:TEXT]",
        help=f"suites ({', '.join(SUITES)}), each with or without a text that the "
        'point of a group must contain ("mixtures:e = 8")',
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="file of results")
    command = commands.add_parser("setup", help="make the environments of the peers")
    command.set_defaults(work=setup)
    names = f"any of {', '.join(ENVIRONMENTS)}; default: all"
    command.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=names)
    command = commands.add_parser("compare", help="print what fell between two files")
    command.set_defaults(work=compare)
    command.add_argument("old", type=Path, metavar="OLD.json", help="from --json")
    command.add_argument("new", type=Path, metavar="NEW.json", help="from --json")
    command = commands.add_parser("page", help="write the page of the documentation")
    command.set_defaults(work=page)
    command.add_argument("file", type=Path, metavar="FILE.json", help="from --json")
    where = "folder of the page (default: docs, whose page is overwritten)"
    docs = ROOT / "docs"
    command.add_argument(
        "--docs", type=Path, default=docs, metavar="FOLDER", help=where
    )
    return parser


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
