"""Run folders and files, written atomically."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recsys_examples.errors import InputError


@contextmanager
def run_folder(parent: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder that is renamed to its final path at the end.

    Args:
        parent: folder of the run's folder, whose name is the current time.

    Yields:
        The temporary folder to write to, and its final path. If the block fails or is
        interrupted, the temporary folder is removed.

    Raises:
        InputError: if nothing can be written under `parent`.
    """
    made = make_folder(parent)
    try:
        hidden = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    except OSError as error:
        raise _not_writable(parent, error) from error
    try:
        hidden.chmod(0o755)  # mkdtemp creates it with 0o700
        final = _free_name(parent / time.strftime("%Y-%m-%dT%H-%M-%S"))
        yield hidden, final
        hidden.rename(final)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: another process uses it
                folder.rmdir()
        raise


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its missing parents; return those created, innermost first.

    Raises:
        InputError: if it cannot be created.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return missing


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to the output folder {folder}: {error.strerror}")


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, or "not installed"."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def find_saved_model(run: Path) -> Path:
    """Return the SavedModel folder of a run, or `run` itself if it is a SavedModel.

    Raises:
        InputError: if it is neither.
    """
    for folder in (run / "saved_model", run):
        try:
            if (folder / "saved_model.pb").is_file():
                return folder
        except OSError as error:
            raise InputError(f"{run}: cannot be read: {error.strerror}") from error
    raise InputError(
        f"{run}: not a run or a SavedModel: found neither saved_model/saved_model.pb "
        "nor saved_model.pb"
    )
