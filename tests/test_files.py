"""Atomic writes: whole or not at all, and nothing is left by dead processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keras_moe import _files
from keras_moe._files import PREFIX, atomic_write, hidden_folder, remove_stale

# A process that loads the module alone, without Keras, which takes seconds.
LOADED = f"""
import importlib.util, os, pathlib, sys, time
spec = importlib.util.spec_from_file_location("files", {_files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
folder = pathlib.Path(sys.argv[1])
"""
WRITES = """
with files.atomic_write(folder / "out") as path:
    path.mkdir()
    (path / "a").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def _start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", LOADED + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


def _kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of a write."""
    process = _start(WRITES, tmp_path)
    assert process.stdout.readline() == "ready\n"
    yield process
    _kill(process)


def _content(path):
    return {p.name: p.read_text() for p in path.rglob("*") if p.is_file()}


class TestAtomicWrite:
    def test_a_file_and_a_folder(self, tmp_path):
        with atomic_write(tmp_path / "new" / "a.txt") as path:
            path.write_text("a")
            assert not (tmp_path / "new" / "a.txt").exists()
        with atomic_write(tmp_path / "b") as path:
            (path / "deep").mkdir(parents=True)
            (path / "deep" / "b.txt").write_text("b")
        assert _content(tmp_path) == {"a.txt": "a", "b.txt": "b"}
        assert sorted(os.listdir(tmp_path)) == ["b", "new"]
        assert os.listdir(tmp_path / "new") == ["a.txt"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_nothing_is_left_after_an_error(self, tmp_path, error):
        def fail():
            with atomic_write(tmp_path / "new" / "deep" / "a.txt") as path:
                path.write_text("a")
                raise error

        with pytest.raises(error):
            fail()
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
    def test_what_exists_is_kept(self, tmp_path, kind):
        taken = tmp_path / "taken"
        if kind == "file":
            taken.write_text("theirs")
        elif kind == "folder":
            taken.mkdir()
        else:
            taken.symlink_to("nowhere")
        with (
            pytest.raises(FileExistsError, match=r"must not exist.*taken"),
            atomic_write(taken),
        ):
            pytest.fail("entered")
        assert os.listdir(tmp_path) == ["taken"]

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_what_another_process_made_meanwhile_is_kept(self, tmp_path, kind):
        taken = tmp_path / "taken"

        def write():
            with atomic_write(taken) as path:
                if kind == "file":
                    path.write_text("mine")
                    taken.write_text("theirs")
                else:
                    for folder, owner in ((path, "mine"), (taken, "theirs")):
                        folder.mkdir()
                        (folder / "a").write_text(owner)

        with pytest.raises(FileExistsError, match=r"must not exist.*taken"):
            write()
        assert list(_content(tmp_path).values()) == ["theirs"]

    def test_companions_are_removed_if_the_file_cannot_be_moved(self, tmp_path):
        path, companion = tmp_path / "a.xml", tmp_path / "a.bin"

        def write():
            with atomic_write(path, companion) as unfinished:
                unfinished.write_text("mine")
                unfinished.with_suffix(".bin").write_text("mine")
                path.write_text("theirs")

        with pytest.raises(FileExistsError):
            write()
        assert _content(tmp_path) == {"a.xml": "theirs"}

    def test_overwrite_replaces_a_file(self, tmp_path):
        for text in "ab":
            with atomic_write(tmp_path / "a", overwrite=True) as path:
                path.write_text(text)
        assert _content(tmp_path) == {"a": "b"}
        assert os.listdir(tmp_path) == ["a"]

    def test_overwrite_keeps_a_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "old").write_text("kept")

        def write():
            with atomic_write(tmp_path / "a", overwrite=True) as path:
                path.mkdir()
                (path / "new").write_text("new")

        with pytest.raises(FileExistsError):
            write()
        assert _content(tmp_path) == {"old": "kept"}

    def test_everything_is_on_the_disk_before_it_is_moved(self, tmp_path, monkeypatch):
        events = []

        def synced(handle):
            events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

        def renamed(source, final):
            events.append("rename")

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)
        with atomic_write(tmp_path / "out") as path:
            (path / "deep").mkdir(parents=True)
            (path / "deep" / "a").write_text("a")
        assert events == ["a", "deep", "out", "rename", tmp_path.name]

    def test_new_parents_are_on_the_disk_too(self, tmp_path, monkeypatch):
        flushed = []
        monkeypatch.setattr(_files, "flush_entries", flushed.append)
        with atomic_write(tmp_path / "new" / "deep" / "a") as path:
            path.write_text("a")
        new = tmp_path / "new"
        assert flushed == [new, tmp_path, new / "deep"]

    def test_an_error_of_a_full_disk_names_the_output(self, tmp_path):
        """TensorFlow and HDF5 say so in errors of their own."""

        def fail(error):
            with atomic_write(tmp_path / "a"):
                raise error

        for error in (
            OSError(28, "No space left on device"),
            RuntimeError("write failed; No space left on device [Op:SaveV2]"),
        ):
            with pytest.raises(OSError, match="No space left on device") as caught:
                fail(error)
            assert caught.value.errno == 28
            assert caught.value.filename == str(tmp_path / "a")
        for error in (RuntimeError("other"), FileNotFoundError(2, "absent", "b")):
            with pytest.raises(type(error)) as caught:
                fail(error)
            assert caught.value is error
        assert os.listdir(tmp_path) == []

    def test_of_two_writers_one_fails_and_loses_nothing_of_the_other(self, tmp_path):
        barrier = threading.Barrier(8)

        def write(number):
            try:
                with atomic_write(tmp_path / "new" / "out") as path:
                    path.mkdir()
                    (path / "a").write_text(str(number))
                    barrier.wait()
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            (winner,) = {*pool.map(write, range(8))} - {None}
        assert _content(tmp_path) == {"a": str(winner)}
        assert os.listdir(tmp_path / "new") == ["out"]


class TestRemoveStale:
    def test_of_a_living_process_is_kept(self, tmp_path, writer):
        before = _content(tmp_path)
        assert before["a"] == "half"
        assert remove_stale(tmp_path) == []
        with atomic_write(tmp_path / "other") as path:
            path.write_text("b")
        assert _content(tmp_path) == {**before, "other": "b"}

    def test_of_a_killed_process_is_removed_by_the_next_write(self, tmp_path, writer):
        _kill(writer)
        assert any(name.startswith(PREFIX) for name in os.listdir(tmp_path))
        with atomic_write(tmp_path / "out") as path:
            path.write_text("b")
        assert os.listdir(tmp_path) == ["out"]

    def test_of_another_machine_on_a_shared_disk_is_kept(
        self, tmp_path, writer, monkeypatch
    ):
        _kill(writer)
        monkeypatch.setattr(_files, "_machine", lambda: "another")
        monkeypatch.setattr(_files, "_file_system", lambda path: "nfs4")
        assert remove_stale(tmp_path) == []
        monkeypatch.setattr(_files, "_file_system", lambda path: "ext4")
        assert len(remove_stale(tmp_path)) == 1

    def test_without_a_lock_is_kept(self, tmp_path):
        for name in (f"{PREFIX}a", ".unfinished-a"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a").write_text("theirs")
        assert remove_stale(tmp_path) == []
        assert len(_content(tmp_path)) == 1

    def test_killed_before_its_lock(self, tmp_path):
        (tmp_path / f"{PREFIX}a").mkdir()
        assert remove_stale(tmp_path) == [tmp_path / f"{PREFIX}a"]
        assert os.listdir(tmp_path) == []

    def test_a_link_is_not_followed(self, tmp_path, writer):
        _kill(writer)
        (hidden,) = tmp_path.glob(f"{PREFIX}*")
        hidden.rename(tmp_path / "theirs")
        hidden.symlink_to("theirs")
        assert remove_stale(tmp_path) == []
        assert _content(tmp_path / "theirs")["a"] == "half"

    def test_on_a_disk_without_locks_nothing_is_removed(self, tmp_path, monkeypatch):
        def refuse(handle, operation):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(_files.fcntl, "flock", refuse)
        with hidden_folder(tmp_path) as hidden:
            assert remove_stale(tmp_path) == []
            assert hidden.is_dir()
        assert os.listdir(tmp_path) == []

    def test_threads_that_create_and_clean_at_once(self, tmp_path):
        end = time.monotonic() + 0.5

        def work(number):
            count = 0
            while time.monotonic() < end:
                with atomic_write(tmp_path / "out" / f"{number}-{count}") as path:
                    remove_stale(tmp_path / "out")
                    path.write_text(str(count))
                count += 1
            return count

        with ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(work, range(8)))
        assert min(counts) > 0
        assert len(os.listdir(tmp_path / "out")) == sum(counts)
