"""python -m keras_moe.report RUN: write the page of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from keras_moe.report._names import PAGE
from keras_moe.report._page import report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_moe.report",
        description="Write one self-contained HTML page about a training run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, help=f"file to write (default: RUN/{PAGE})")
    given = parser.parse_args(arguments)
    try:
        print(f"Written to {report(given.run, given.out)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
