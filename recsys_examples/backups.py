"""The folder in which an interrupted run leaves its backups for `--resume`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recsys_examples import files
from recsys_examples.errors import InputError
from recsys_examples.runs import make_folder

_LOCK = "lock"
_MOST = 100


@contextmanager
def backup_folder(
    parent: Path, depends_on: Mapping[str, Any], resume: bool
) -> Iterator[Path]:
    """Yield a folder for backups, which is deleted if no error is raised.

    A folder belongs to the runs with the same `depends_on`. Two that run at once have
    one each.

    Args:
        parent: folder of the runs.
        depends_on: JSON object of what a training depends on: options and versions.
        resume: whether to go on from the backups of an interrupted run. Otherwise they
            are discarded.

    Raises:
        InputError: if there is no interrupted run to go on with, or if nothing can be
            written.
    """
    parents = make_folder(parent)
    text = json.dumps(depends_on, sort_keys=True)
    name = f"interrupted-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    for path in (parent / name, *(parent / f"{name}-{i}" for i in range(2, _MOST))):
        if resume and not path.exists():
            _remove(path, parents)
            raise InputError(
                f"{parent}: no interrupted run with these options and versions; start "
                "without --resume"
            )
        made = [*make_folder(path), *parents]
        lock = _lock(path)
        if lock is not None:
            break
    else:
        raise InputError(f"{parent}: {_MOST - 1} runs with these options are running")
    backups = path / "backups"
    try:
        if not resume:
            shutil.rmtree(backups, ignore_errors=True)
        make_folder(backups)
        yield backups
    except BaseException:
        if not any(file.is_file() for file in backups.rglob("*")):
            _remove(path, made)  # There is nothing to go on from.
        raise
    else:
        _remove(path, made)
    finally:
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return the handle of a lock, or None if a living process has it."""
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    # A run that ended meanwhile has removed the file that was opened.
    if files.try_lock(handle) and os.fstat(handle).st_nlink:
        return handle
    os.close(handle)
    return None


def _remove(path: Path, made: list[Path]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for folder in made:
        with suppress(OSError):  # not empty, or removed
            folder.rmdir()
