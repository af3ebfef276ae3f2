"""Ways to damage a file, chosen by a seeded generator."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = (
    *("flipped bit",) * 3,
    *("truncated",) * 2,
    *("zeros", "foreign", "empty", "missing", "a folder", "unreadable"),
)
_NOBODY = 65534
judged: list[str] = []  # all errors that were judged, to count them
_FOREIGN = (b"not a model", b"\x80\x04]", b"PK\x03\x04", b"[1, 2]\n", b"{}\n", b"\n")


def damage(path: Path, kind: str, rng: random.Random) -> str:
    """Damage a file in place; return what was done."""
    content = path.read_bytes()
    if kind == "flipped bit":
        bit = rng.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        return f"{path.name}: bit {bit} flipped"
    if kind == "truncated":
        size = rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"{path.name}: cut to {size} bytes"
    if kind == "zeros":
        start = rng.randrange(len(content))
        end = min(start + 512, len(content))
        path.write_bytes(content[:start] + bytes(end - start) + content[end:])
        return f"{path.name}: zeros from {start} to {end}"
    if kind == "foreign":
        foreign = rng.choice(_FOREIGN)
        path.write_bytes(foreign)
        return f"{path.name}: {foreign!r}"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "unreadable":
        path.chmod(0)
    else:
        path.unlink()
        if kind == "a folder":
            path.mkdir()
    return f"{path.name}: {kind}"


@contextmanager
def copied(source: Path, folder: Path) -> Iterator[Path]:
    """Yield a copy of a folder, which is removed at the end."""
    copy = folder / source.name
    shutil.copytree(source, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


@contextmanager
def without_root() -> Iterator[None]:
    """Run without the rights of root, who may read and write anything."""
    if os.geteuid():
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def error_fault(error: BaseException, *names: Path) -> str | None:
    """Return what is wrong with an error's message: one line that names the file."""
    text = str(error)
    judged.append(text)
    if "\n" in text:
        return f"several lines: {text!r}"
    if not any(str(name) in text for name in names):
        return f"names no file: {text!r}"
    return None
