"""Atomic writes: a file or folder appears complete or not at all.

Output is written in a hidden folder beside its final path, flushed to the disk, and
renamed. A process that is killed leaves the hidden folder, which the next write to the
same folder removes: a process holds a lock (`flock`) in its hidden folder as long as it
lives. The name of the lock file says on which machine it is, since some network file
systems do not show a lock to other machines.

This module imports the standard library alone: the examples load it without Keras.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and no other folder removed
    fcntl = None  # type: ignore[assignment]

PREFIX = ".partial-"
_LOCK = ".lock-"
_UNLOCKED = ".unlocked"
_ATTEMPTS = 1000
# File systems of one machine: a free lock has no owner, wherever it was taken.
_OF_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs"} | {
    "tmpfs",
    "xfs",
    "zfs",
}
# What a write says if the disk is the cause, whatever it wrote; and what may also come
# from a file that was read.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_OF_A_PATH = (errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ENOENT)
# Errors of `fsync` on file systems that cannot flush a folder.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def check_free(*paths: Path) -> None:
    """Raise FileExistsError if one of the paths exists."""
    for taken in paths:
        if os.path.lexists(taken):
            raise FileExistsError(f"`path` must not exist. Received: {taken}")


@contextlib.contextmanager
def atomic_write(
    path: str | Path, *companions: Path, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary path, which is moved to `path` if no error is raised.

    Everything is on the disk (`fsync`) before it is moved. Missing parent folders are
    created, and removed again after an error. What dead processes left beside `path` is
    removed.

    Args:
        path: the file or folder to write.
        *companions: further files in the same folder, to which the file refers. They
            are moved before it.
        overwrite: whether to replace an existing file, in one step. A folder that is
            not empty cannot be replaced in one step: FileExistsError.

    Raises:
        FileExistsError: if `path` exists, before or after the block.
        OSError: if the output cannot be written, flushed or moved. It names `path`, and
            stands for TensorFlow's errors of a full or read-only disk too.
    """
    path = Path(os.path.abspath(path))
    if not overwrite:
        check_free(path, *companions)
    made = []
    try:
        made = make_folder(path.parent)
        with hidden_folder(path.parent) as hidden:
            yield hidden / path.name
            finals = [Path(os.path.abspath(final)) for final in (*companions, path)]
            for final in finals:
                flush(hidden / final.name)
            for folder in made:
                flush_entries(folder.parent)
            _move_all(hidden, finals, overwrite)
    except Exception as error:
        remove_empty(made)
        found = disk_error(error, path)
        if found is None:
            raise
        raise found from error
    except BaseException:  # interrupted
        remove_empty(made)
        raise


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its parents; return those created, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: another process uses it
            folder.rmdir()


@contextlib.contextmanager
def hidden_folder(parent: Path, name: str = "") -> Iterator[Path]:
    """Yield a new hidden folder in `parent`, locked, and removed at the end.

    Args:
        parent: an existing folder. Hidden folders of dead processes in it are removed.
        name: end of the folder's name; FileExistsError if there is one. Empty: random.
    """
    remove_stale(parent)
    hidden, lock = _create(parent, name)
    try:
        yield hidden
    finally:
        with contextlib.suppress(OSError):
            _remove(hidden)
        if lock is not None:
            os.close(lock)


def remove_stale(folder: str | Path) -> list[Path]:
    """Remove the hidden folders that dead processes left in `folder`; return them.

    A folder is removed if its lock is free, and if the lock was taken on this machine
    or the file system belongs to one machine.
    """
    try:
        found = sorted(Path(folder).glob(f"{PREFIX}*"))
    except OSError:
        return []
    return [hidden for hidden in found if _remove_if_dead(hidden)]


def try_lock(handle: int) -> bool:
    """Lock an open file; return False if another handle has the lock.

    The lock ends with its handle. Without locks (Windows, some network file systems),
    it returns True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def flush(path: Path) -> None:
    """Flush a file, or a folder with all its contents, to the disk."""
    if path.is_symlink() or os.name == "nt":  # Windows flushes only writable handles
        return
    is_folder = path.is_dir()
    for child in path.iterdir() if is_folder else ():
        flush(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in _NOT_SUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def move(source: Path, final: Path, overwrite: bool = False) -> None:
    """Rename a file or folder; FileExistsError if `final` holds something."""
    try:
        if overwrite:
            os.replace(source, final)
        elif source.is_dir():
            # POSIX replaces an empty folder, in which there is nothing to lose.
            os.rename(source, final)
        else:
            _link(source, final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            message = f"`path` must not exist. Received: {final}"
            raise FileExistsError(message) from error
        raise


def flush_entries(folder: Path) -> None:
    """Flush the names in a folder to the disk, not the contents of its files."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(handle)


def disk_error(error: BaseException, path: str | Path) -> OSError | None:
    """Return an OSError that names `path` if it could not be written, or None.

    TensorFlow and HDF5 raise errors of their own, with the text of the system's error.
    Those that a read may have too count only if their text has the path of the output.
    """
    found: BaseException | None = error
    while found is not None:
        text = str(found)
        is_of_output = PREFIX in text or os.path.abspath(path) in text
        codes = _FULL + (_OF_A_PATH if is_of_output else ())
        for code in codes:
            reason = os.strerror(code)
            if reason in text or getattr(found, "errno", None) == code:
                return OSError(code, reason, str(path))
        found = found.__cause__ or found.__context__
    return None


def _move_all(hidden: Path, finals: list[Path], overwrite: bool) -> None:
    """Move the files; if one cannot be moved, remove those that were new."""
    moved: list[Path] = []
    try:
        for final in finals:
            move(hidden / final.name, final, overwrite)
            moved.append(final)
        for folder in {final.parent for final in finals}:
            flush_entries(folder)
    except BaseException:
        for final in moved if not overwrite else ():
            with contextlib.suppress(OSError):
                shutil.rmtree(final) if final.is_dir() else final.unlink()
        raise


def _link(source: Path, final: Path) -> None:
    """Rename a file without replacing another: `rename` would replace it."""
    try:
        os.link(source, final)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        check_free(final)
        os.rename(source, final)


def _create(parent: Path, name: str) -> tuple[Path, int | None]:
    """Create a hidden folder and lock it."""
    for _ in range(_ATTEMPTS):
        # Another process may remove the folders that it created, if they are empty.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            parent.mkdir(parents=True, exist_ok=True)
            if name:
                hidden = parent / f"{PREFIX}{name}"
                hidden.mkdir()
            else:
                hidden = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            try:
                return hidden, _lock(hidden)
            except OSError:
                remove_empty([hidden])
                raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(parent))


def _lock(hidden: Path) -> int | None:
    """Return the locked handle of a new lock file, or None without locks.

    Raises:
        FileNotFoundError: if the folder or the lock file was removed meanwhile.
        BlockingIOError: if another process is about to remove them.
    """
    if fcntl is None:
        return None
    path = hidden / f"{_LOCK}{_machine()}"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(handle).st_nlink:
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:  # a file system without locks: nothing is ever removed
        path.rename(hidden / _UNLOCKED)
        os.close(handle)
        return None
    return handle


def _remove_if_dead(hidden: Path) -> bool:
    try:
        if fcntl is None or hidden.is_symlink() or not hidden.is_dir():
            return False
        locks = list(hidden.glob(f"{_LOCK}*"))
        if not locks and not any(hidden.iterdir()):
            hidden.rmdir()  # killed before it made its lock file
            return True
        if len(locks) != 1 or not _shows_locks(locks[0]):
            return False
        handle = os.open(locks[0], os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(handle).st_nlink:
                return False
            _remove(hidden)
        finally:
            os.close(handle)
    except OSError:  # a living process has the lock, or this one may not remove it
        return False
    return True


def _remove(hidden: Path) -> None:
    """Remove a hidden folder, the lock file last."""
    children = sorted(hidden.iterdir(), key=lambda p: p.name.startswith(_LOCK))
    for child in children:
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    hidden.rmdir()


def _shows_locks(lock: Path) -> bool:
    """Return whether a lock of a living process would be seen here."""
    if lock.name == f"{_LOCK}{_machine()}":
        return True
    return _file_system(lock) in _OF_ONE_MACHINE


@cache
def _machine() -> str:
    """Return a hash of the running kernel's id, which containers on it share."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _file_system(path: Path) -> str:
    """Return the type of the file system of a path, "" if unknown."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, source = line.partition(" - ")
            if fields.split()[2] == wanted:
                return source.split()[0]
    return ""
