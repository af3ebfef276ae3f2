"""Run folders and files are written atomically."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from recsys_examples.errors import InputError
from recsys_examples.records import RecordsFile
from recsys_examples.runs import read_json, run_folder, versions, write_json

# A run that waits for its stdin to close before it ends.
RUN = """
import sys
from pathlib import Path
from recsys_examples.runs import run_folder

with run_folder(Path(sys.argv[1])) as (folder, final):
    (folder / "name").write_text(final.name)
    print("ready", flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


def _start(parent):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )


@contextmanager
def no_room_after(size):
    """Let this process write no file beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def as_nobody():
    """Run without the rights of root, who may write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestRunFolder:
    def test_renamed_at_the_end(self, tmp_path):
        parent = tmp_path / "new" / "runs"
        with run_folder(parent) as (folder, final):
            assert folder.is_dir()
            assert folder.parent.name == f".partial-{final.name}"
            assert not final.exists()
            (folder / "a.txt").write_text("a")
        assert os.listdir(parent) == [final.name]
        assert (final / "a.txt").read_text() == "a"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", final.name)
        assert final.stat().st_mode & 0o777 == 0o755

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_removed_after_a_failure(self, tmp_path, error):
        def fail():
            with run_folder(tmp_path / "new" / "runs") as (folder, _):
                (folder / "deep").mkdir()
                (folder / "deep" / "a.txt").write_text("a")
                raise error

        with pytest.raises(error):
            fail()
        assert os.listdir(tmp_path) == []

    def test_existing_files_are_kept_after_a_failure(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match="failed"), run_folder(tmp_path):
            raise ValueError("failed")
        assert os.listdir(tmp_path) == ["mine.txt"]

    def test_two_within_a_second(self, tmp_path):
        names = []
        for _ in range(3):
            with run_folder(tmp_path) as (folder, final):
                (folder / "a.txt").write_text(str(len(names)))
            names.append(final)
        assert len(set(names)) == 3
        assert [(n / "a.txt").read_text() for n in names] == ["0", "1", "2"]

    @pytest.mark.parametrize("inside", [False, True])
    def test_a_file_at_its_path(self, tmp_path, inside):
        (tmp_path / "file").write_text("kept")
        parent = tmp_path / "file" / "runs" if inside else tmp_path / "file"
        with (
            pytest.raises(InputError, match="cannot write to the output folder") as it,
            run_folder(parent),
        ):
            pytest.fail("entered")
        assert str(parent) in str(it.value)
        assert (tmp_path / "file").read_text() == "kept"

    def test_read_only(self, tmp_path):
        for folder in (*tmp_path.parents[:2], tmp_path):
            folder.chmod(0o755)
        tmp_path.chmod(0o555)
        with (
            as_nobody(),
            pytest.raises(InputError, match=r"cannot write.*Permission denied"),
            run_folder(tmp_path / "runs"),
        ):
            pytest.fail("entered")

    def test_runs_of_several_processes_at_once(self, tmp_path):
        runs = [_start(tmp_path) for _ in range(6)]
        assert [run.stdout.readline() for run in runs] == ["ready\n"] * 6
        for run in runs:  # all have begun, none has ended
            run.communicate()
        assert [run.returncode for run in runs] == [0] * 6
        names = os.listdir(tmp_path)
        assert len(names) == 6
        # Each is in the folder that it was told.
        assert [(tmp_path / name / "name").read_text() for name in names] == names

    def test_threads_within_a_second(self, tmp_path, monkeypatch):
        monkeypatch.setattr("time.strftime", lambda _: "now")

        def run(number):
            with run_folder(tmp_path) as (folder, final):
                (folder / "number").write_text(str(number))
            return final

        with ThreadPoolExecutor(8) as pool:
            finals = list(pool.map(run, range(40)))
        found = [int((final / "number").read_text()) for final in finals]
        assert found == list(range(40))
        assert len(os.listdir(tmp_path)) == 40

    def test_an_empty_folder_of_its_name_is_not_taken(self, tmp_path, monkeypatch):
        monkeypatch.setattr("time.strftime", lambda _: "now")
        (tmp_path / "now").mkdir()
        with run_folder(tmp_path) as (folder, final):
            (folder / "a").write_text("a")
            assert os.listdir(tmp_path / ".partial-now-2") != []
            assert len(list(tmp_path.glob(".partial-*"))) == 1  # none for "now"
        assert final.name == "now-2"
        assert os.listdir(tmp_path / "now") == []

    def test_a_folder_that_someone_else_made_meanwhile(self, tmp_path, capsys):
        with run_folder(tmp_path) as (folder, final):
            (folder / "a").write_text("mine")
            final.mkdir()
            (final / "a").write_text("theirs")
        other = final.with_name(f"{final.name}-2")
        assert (final / "a").read_text() == "theirs"
        assert (other / "a").read_text() == "mine"
        assert f"written to {other}" in capsys.readouterr().err

    def test_the_next_run_removes_what_a_killed_one_left(self, tmp_path):
        killed, living = _start(tmp_path), _start(tmp_path)
        for run in (killed, living):
            assert run.stdout.readline() == "ready\n"
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert len(list(tmp_path.glob(".partial-*"))) == 2
        with run_folder(tmp_path):
            assert len(list(tmp_path.glob(".partial-*"))) == 2  # the living and this
        living.communicate()
        assert living.returncode == 0
        assert len(os.listdir(tmp_path)) == 2

    def test_a_full_disk(self, tmp_path):
        (tmp_path / "old").write_text("kept")

        def run():
            with run_folder(tmp_path) as (folder, _), no_room_after(1000):
                (folder / "a").write_bytes(bytes(2000))

        message = f"cannot write to the output folder {tmp_path}: File too large"
        with pytest.raises(InputError, match=re.escape(message)):
            run()
        assert os.listdir(tmp_path) == ["old"]

    def test_errors_that_are_not_of_the_disk_are_unchanged(self, tmp_path):
        with pytest.raises(FileNotFoundError), run_folder(tmp_path):
            Path("/no/such/file").read_text()


class TestWriteJson:
    def test_content_and_no_leftovers(self, tmp_path):
        write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
        write_json(tmp_path / "a.json", {"c": "ü"})
        assert os.listdir(tmp_path) == ["a.json"]
        found = json.loads((tmp_path / "a.json").read_text())
        assert found == {"c": "ü", "crc32": found["crc32"]}
        assert read_json(tmp_path / "a.json", "") == found

    def test_an_existing_file_is_kept_if_the_value_is_not_json(self, tmp_path):
        write_json(tmp_path / "a.json", 1)
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", [2, np.float32(3)])
        assert os.listdir(tmp_path) == ["a.json"]
        assert json.loads((tmp_path / "a.json").read_text()) == 1

    @pytest.mark.parametrize("size", [0, 1, 20])
    def test_a_full_disk(self, tmp_path, size):
        path = tmp_path / "a.json"
        write_json(path, {"old": 1})
        with (
            no_room_after(size),
            pytest.raises(InputError, match=r"cannot write to .*a\.json: File too"),
        ):
            write_json(path, {"new": [1] * 100})
        assert read_json(path, "")["old"] == 1
        assert os.listdir(tmp_path) == ["a.json"]

    def test_a_folder_at_its_path(self, tmp_path):
        (tmp_path / "a.json").mkdir()
        with pytest.raises(InputError, match=r"a\.json.*folder"):
            write_json(tmp_path / "a.json", {})


class TestReadJson:
    def test_a_flipped_bit_is_noticed_or_changes_nothing(self, tmp_path):
        path = tmp_path / "a.json"
        write_json(path, {"loss": 0.1234, "names": ["a", "b"]})
        content = path.read_bytes()
        good = json.loads(content)
        errors = 0
        for bit in range(0, 8 * len(content), 3):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = read_json(path, "remove it")
            except InputError as error:
                assert re.match(rf"{path}: .*; remove it", str(error))  # noqa: PT017
                errors += 1
            else:
                # Only the checksum's own name may be lost, as in older files.
                assert [found[name] for name in good if name != "crc32"] == [
                    0.1234,
                    ["a", "b"],
                ]
        assert errors > 0.8 * 8 / 3 * len(content)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10**5]
    )
    def test_foreign_files(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.json: not a JSON .*; remove it"):
            read_json(tmp_path / "a.json", "remove it")

    def test_missing_and_a_folder(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read: No such file"):
            read_json(tmp_path / "a.json", "")
        with pytest.raises(InputError, match="cannot be read: Is a directory"):
            read_json(tmp_path, "")


class TestRecordsFile:
    def test_a_full_disk_keeps_the_finished_records(self, tmp_path):
        path = tmp_path / "results.jsonl"
        file = RecordsFile(path, {"version": 1}, resume=False)
        file.add({"loss": 0.5})
        whole = path.read_bytes()
        for room in (0, 1, 30):
            with (
                no_room_after(len(whole) + room),
                pytest.raises(InputError, match=r"results\.jsonl: File too large"),
            ):
                file.add({"losses": [0.25] * 20})
            assert path.read_bytes() == whole
        file.add({"loss": 0.25})
        del file
        found = RecordsFile(path, {"version": 1}, resume=True).found
        assert [record for _, record in found] == [{"loss": 0.5}, {"loss": 0.25}]

    def test_a_full_disk_at_the_start_leaves_no_file(self, tmp_path):
        path = tmp_path / "results.jsonl"
        with no_room_after(5), pytest.raises(InputError, match="File too large"):
            RecordsFile(path, {"version": 1}, resume=False)
        assert os.listdir(tmp_path) == []
        RecordsFile(path, {"version": 1}, resume=False)

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        path = tmp_path / "results.jsonl"
        file = RecordsFile(path, {"version": 1}, resume=False)
        file.add({"loss": 0.5})
        del file
        content = path.read_bytes()
        for bit in range(0, 8 * (len(content) - 1), 3):  # without the last line end
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                RecordsFile(path, {"version": 1}, resume=True)
            except InputError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                pytest.fail(f"bit {bit}: {bytes(damaged)!r}")

    def test_files_without_checksums_are_read(self, tmp_path):
        path = tmp_path / "results.jsonl"
        path.write_text('{"version": 1}\n{"loss": 0.5}\n')
        found = RecordsFile(path, {"version": 1}, resume=True).found
        assert found == [(f"{path}, line 2", {"loss": 0.5})]

    def test_two_processes_cannot_continue_one_study(self, tmp_path):
        path = tmp_path / "results.jsonl"
        first = RecordsFile(path, {}, resume=False)
        with pytest.raises(InputError, match="another process is writing"):
            RecordsFile(path, {}, resume=True)
        del first
        RecordsFile(path, {}, resume=True)


def test_versions():
    assert versions("numpy", "no-such-package-at-all") == {
        "numpy": np.__version__,
        "no-such-package-at-all": "not installed",
    }
