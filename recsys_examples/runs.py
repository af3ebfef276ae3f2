"""Run folders, which appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recsys_examples.errors import InputError


@contextmanager
def run_folder(parent: Path) -> Iterator[tuple[Path, Path]]:
    """Give a folder to write in, which is renamed into place at the end.

    Args:
        parent: where the run's folder is to appear, named by the time.

    Yields:
        The hidden folder to write to, and the path it will have. If the block fails
        or is interrupted, the hidden folder is removed and nothing appears.

    Raises:
        InputError: if nothing can be written under `parent`.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    except OSError as error:
        raise InputError(
            f"cannot write to the output folder {parent}: {error.strerror}"
        ) from error
    try:
        hidden.chmod(0o755)  # mkdtemp makes it private
        final = _free_name(parent / time.strftime("%Y-%m-%dT%H-%M-%S"))
        yield hidden, final
        hidden.rename(final)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is never half there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for the record of a run."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
