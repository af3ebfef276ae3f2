"""Run folders and files are written atomically."""

import json
import os
import re

import numpy as np
import pytest

from recsys_examples.errors import InputError
from recsys_examples.runs import run_folder, versions, write_json


class TestRunFolder:
    def test_renamed_at_the_end(self, tmp_path):
        parent = tmp_path / "new" / "runs"
        with run_folder(parent) as (folder, final):
            assert folder.is_dir()
            assert folder.name.startswith(".")
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

    @pytest.mark.skipif(os.geteuid() == 0, reason="root can write to any folder")
    def test_read_only(self, tmp_path):
        tmp_path.chmod(0o500)
        with (
            pytest.raises(InputError, match="Permission denied"),
            run_folder(tmp_path / "runs"),
        ):
            pytest.fail("entered")


class TestWriteJson:
    def test_content_and_no_leftovers(self, tmp_path):
        write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
        write_json(tmp_path / "a.json", {"c": "ü"})
        assert os.listdir(tmp_path) == ["a.json"]
        assert json.loads((tmp_path / "a.json").read_text()) == {"c": "ü"}

    def test_an_existing_file_is_kept_if_the_value_is_not_json(self, tmp_path):
        write_json(tmp_path / "a.json", 1)
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", [2, np.float32(3)])
        assert os.listdir(tmp_path) == ["a.json"]
        assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_versions():
    assert versions("numpy", "no-such-package-at-all") == {
        "numpy": np.__version__,
        "no-such-package-at-all": "not installed",
    }
