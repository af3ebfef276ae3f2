"""What a load does beside reading a model: code that runs, files elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What an audit hook of Python reports if code runs.
_EVENTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("pickle.find_class", "marshal.loads", "socket.connect", "urllib.Request"),
    *("os.symlink", "ctypes.dlopen"),
)
# Events of changes on the disk, and how many paths each names first.
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate"), 1),
    **dict.fromkeys(("os.chmod", "os.chown", "shutil.rmtree"), 1),
    **dict.fromkeys(("os.rename", "os.link"), 2),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what an audit hook reports while a file is loaded.

    That is: code that runs, a file below `private` that is opened, and a change on the
    disk that is not below `scratch`. What libraries open in C, as HDF5 does, is not
    reported by Python.
    """

    def __init__(self) -> None:
        self._on = False
        self._seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, details: Any) -> None:
        if not self._on:
            return
        # What follows may open files itself.
        self._on = False
        try:
            found = self._found(event, details)
            if found and not _is_import():
                self._seen.append(found)
        finally:
            self._on = True

    def _found(self, event: str, details: Any) -> str | None:
        if event in _EVENTS:
            return event
        if event == "open":
            paths, is_write = details[:1], bool(details[2] & _WRITES)
        elif event in _CHANGES:
            paths, is_write = details[: _CHANGES[event]], True
        else:
            return None
        # In an open folder: so does `shutil.rmtree`, whose own event names the folder.
        if event in ("os.remove", "os.rmdir") and details[1] != -1:
            return None
        for path in paths:
            if isinstance(path, int):  # an open file
                continue
            where = Path(os.path.realpath(os.fsdecode(path)))
            is_private = where.is_relative_to(self._private)
            is_outside = not where.is_relative_to(self._scratch)
            if is_private or (is_write and is_outside and str(where) != os.devnull):
                return f"{event} of {where}"
        return None

    @contextlib.contextmanager
    def watching(self, private: Path, scratch: Path) -> Iterator[list[str]]:
        self._private, self._scratch = private, scratch
        self._seen, self._on = [], True
        try:
            yield self._seen
        finally:
            self._on = False

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Report nothing, as of files that are opened in C."""
        self._on = False
        try:
            yield
        finally:
            self._on = True


def _is_import() -> bool:
    """Whether Python itself reads a module."""
    frame: Any = sys._getframe(3)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let Keras unpack archives in a folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def tree(folder: Path, but: Path) -> dict[str, str]:
    """Return what is below a folder: the hash of a file, the goal of a link."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_relative_to(but):
            continue
        if path.is_symlink():
            content = f"link to {os.readlink(path)}"
        elif path.is_dir():
            content = "folder"
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = content
    return found
