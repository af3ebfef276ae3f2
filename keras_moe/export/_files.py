"""Atomic writes: files appear complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(*paths: Path) -> None:
    """Raise FileExistsError if one of the paths exists."""
    for taken in paths:
        if taken.exists():
            raise FileExistsError(f"`path` must not exist. Received: {taken}")


@contextmanager
def atomic_write(path: Path, *companions: Path) -> Iterator[Path]:
    """Yield a temporary path, which is moved to `path` if no error is raised."""
    check_free(path, *companions)
    near = next(parent for parent in path.absolute().parents if parent.exists())
    hidden = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=near))
    try:
        yield hidden / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        for final in (*companions, path):  # `path` refers to the others: last.
            (hidden / final.name).rename(final)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
