"""Run folders and files, written atomically."""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recsys_examples import files
from recsys_examples.errors import InputError

CHECKSUM = "crc32"


@contextmanager
def run_folder(parent: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder that is renamed to its final path at the end.

    The final path is reserved: no other run gets it. What runs that were killed left in
    `parent` is removed.

    Args:
        parent: folder of the run's folder, whose name is the current time.

    Yields:
        The temporary folder to write to, and its final path. If the block fails or is
        interrupted, the temporary folder is removed.

    Raises:
        InputError: if nothing can be written under `parent`, or the disk is full.
    """
    made = make_folder(parent)
    try:
        with ExitStack() as stack, _disk_errors(parent, "the output folder "):
            hidden, final = _reserve(parent, stack)
            folder = hidden / "run"
            folder.mkdir()
            yield folder, final
            files.flush(folder)
            _move_to_free_name(folder, final)
            files.flush_entries(parent)
    except BaseException:
        files.remove_empty(made)
        raise


def _reserve(parent: Path, stack: ExitStack) -> tuple[Path, Path]:
    """Return a hidden folder and the path that its name reserves."""
    for final in _names(parent / time.strftime("%Y-%m-%dT%H-%M-%S")):
        with ExitStack() as reserved:
            try:
                hidden = files.hidden_folder(parent, final.name)
                folder = reserved.enter_context(hidden)
            except FileExistsError:  # a run that began in the same second
                continue
            # Only now: such a run may have ended before the hidden folder was made.
            if not final.exists():
                stack.enter_context(reserved.pop_all())
                return folder, final
    raise InputError(f"cannot write to the output folder {parent}: no free name")


def _move_to_free_name(folder: Path, final: Path) -> None:
    """Rename a run's folder, to another name if someone else has made this one."""
    for name in _names(final):
        try:
            files.move(folder, name)
        except FileExistsError:
            continue
        if name != final:
            print(f"{final} exists: written to {name}", file=sys.stderr)
        return
    raise InputError(f"cannot write to the output folder {final.parent}: no free name")


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in range(2, 10_000):
        yield path.with_name(f"{path.name}-{number}")


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its missing parents; return those created, innermost first.

    Raises:
        InputError: if it cannot be created.
    """
    try:
        return files.make_folder(folder)
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to the output folder {folder}: {error.strerror}")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path of a file that replaces `path` in one step at the end.

    Raises:
        InputError: if it cannot be written; `path` is then as it was.
    """
    with _disk_errors(path):
        try:
            with files.atomic_write(path, overwrite=True) as unfinished:
                yield unfinished
        except FileExistsError as error:
            raise InputError(f"cannot write to {path}: it is a folder") from error


@contextmanager
def _disk_errors(path: Path, what: str = "") -> Iterator[None]:
    """Raise InputError for errors of the disk: full, read-only, no permission."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        found = files.disk_error(error, path)
        if found is None:
            raise
        reason = f"cannot write to {what}{path}: {found.strerror}"
        raise InputError(reason) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; an object gets the checksum of its other items.

    Raises:
        InputError: if it cannot be written.
    """
    if isinstance(value, dict):
        value = sealed(value)
    text = json.dumps(value, indent=2) + "\n"
    with replaced(path) as unfinished:
        unfinished.write_text(text)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object that `write_json` wrote, with its checksum if it has one.

    Args:
        path: the file.
        remedy: what the user can do about a damaged file, for the error.

    Raises:
        InputError: if the file cannot be read or is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        reason = f"not a JSON file: {error}"
    else:
        if not isinstance(value, dict):
            reason = "not a JSON object"
        elif not is_whole(value):
            reason = "damaged: its checksum differs"
        else:
            return value
    raise InputError(f"{path}: {reason}; {remedy}")


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the checksum of its items."""
    return {**record, CHECKSUM: _checksum(json.loads(json.dumps(record)))}


def is_whole(record: dict[str, Any]) -> bool:
    """Return whether a JSON object has no checksum, or the one of its other items."""
    rest = {name: value for name, value in record.items() if name != CHECKSUM}
    return CHECKSUM not in record or record[CHECKSUM] == _checksum(rest)


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


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
