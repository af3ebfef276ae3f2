"""The page of robustness: `python -m tests.robustness page FILE.json ...`.

The section of each file's profile is written anew, the others stay as they are.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tests.robustness.results import Tried, read

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
HEAD = """# Robustness

This page was written by `python -m tests.robustness page FILE.json ...`, from what the
commands below found.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", choices=["page"])
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    write_page(PAGE, given.files)
    print(PAGE)


def write_page(page: Path, files: Sequence[Path]) -> None:
    """Write the sections of the files; keep those that the page has of others."""
    sections = {}
    for text in re.split(r"\n(?=## )", page.read_text() if page.exists() else "")[1:]:
        sections[text.splitlines()[0]] = f"\n{text.rstrip()}\n"
    for path in files:
        text = _section(path)
        sections[text.splitlines()[1]] = text
    page.write_text(HEAD + "".join(sections.values()))


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
