"""The page of robustness: `python -m tests.robustness page FILE.json ...`."""

import argparse
from pathlib import Path

from tests.robustness.results import Tried, read

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
HEAD = """# Robustness

This page was written by `python -m tests.robustness page FILE.json ...`, from what the
commands below found. Not on it yet, because they have not been run whole on this
version: `tests.robustness.arguments`, `resume` and `bad_data`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", choices=["page"])
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    PAGE.write_text(HEAD + "".join(_section(path) for path in given.files))
    print(PAGE)


def _section(path: Path) -> str:
    name, command, tried = read(path)
    tried = [line for line in tried if line.cases]
    lines = [f"\n## {name[0].upper()}{name[1:]}\n", f"`{command}`\n"]
    lines += ["| tried | cases | right | a right outcome |", "|---|---|---|---|"]
    lines += [_row(line) for line in tried]
    notes = [f"- {line.what}: {line.note.rstrip('.')}." for line in tried if line.note]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _row(line: Tried) -> str:
    return f"| {line.what} | {line.cases:,} | {line.survived:,} | {line.outcome} |"


if __name__ == "__main__":
    main()
