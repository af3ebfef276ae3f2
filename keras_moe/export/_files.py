"""Files that appear whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(*paths: Path) -> None:
    """Refuse a path where there is something."""
    for taken in paths:
        if taken.exists():
            raise FileExistsError(f"`path` must not exist. Received: {taken}")


@contextmanager
def whole(path: Path, *companions: Path) -> Iterator[Path]:
    """Give a path to write to, which takes its place at the end, or never."""
    check_free(path, *companions)
    near = next(parent for parent in path.absolute().parents if parent.exists())
    hidden = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=near))
    try:
        yield hidden / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        for final in (*companions, path):  # What refers to the others comes last.
            (hidden / final.name).rename(final)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
