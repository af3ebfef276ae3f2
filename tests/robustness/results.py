"""Results of the long profiles: a JSON file each, from which the page is made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tried:
    """One line of the page.

    Attributes:
        what: what was tried, as a reader who skims understands it.
        cases: how often.
        survived: in how many cases the outcome was right.
        outcome: what a right outcome is.
        note: figures or the cases that failed, in a sentence; may be empty.
    """

    what: str
    cases: int
    survived: int
    outcome: str
    note: str = ""


def write(path: Path, profile: str, command: str, tried: Sequence[Tried]) -> None:
    """Write a profile's results atomically."""
    record = {
        "profile": profile,
        "command": command,
        "tried": [asdict(line) for line in tried],
    }
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(unfinished, path)


def read(path: Path) -> tuple[str, str, list[Tried]]:
    """Return the name of the profile, its command and its lines."""
    record = json.loads(path.read_text())
    tried = [Tried(**line) for line in record["tried"]]
    return record["profile"], record["command"], tried
