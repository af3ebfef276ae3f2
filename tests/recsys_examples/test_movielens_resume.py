"""`--resume`: an interrupted run ends with the results of one that was not."""

import json

import pytest

from recsys_examples.backups import backup_folder
from recsys_examples.errors import InputError
from recsys_examples.movielens import baselines, pipeline, training
from recsys_examples.movielens.__main__ import main
from tests.recsys_examples.test_movielens_command import write_csv
from tests.support import processes


@pytest.fixture
def command(capfd):
    return processes.in_this_process(main, capfd)


def _results(out):
    (path,) = out.glob("*/metrics.json")
    found = json.loads(path.read_text())
    return found["results"], found["curves"], found["epochs"]


@pytest.mark.usefixtures("eager_training")
def test_an_interrupted_run_goes_on(movielens, tmp_path, monkeypatch, command):
    folder = write_csv(tmp_path / "ml", movielens, users=5)
    monkeypatch.setattr(baselines, "ALS_GRID", baselines.ALS_GRID[:1])
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_BACKUPS", 0.2)
    arguments = ["--data-dir", folder, "--quick", "--seed", "4"]
    status, _, err = command(*arguments, "--out", tmp_path / "whole")
    assert status == 0, err
    assert not list((tmp_path / "whole").glob("interrupted-*"))

    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as interrupted:  # between the two trainings
        interrupted.setattr(pipeline, "calibrate", interrupt)
        assert command(*arguments, "--out", out)[0] == 130
    (left,) = out.iterdir()
    assert left.name.startswith("interrupted-")
    assert list(left.rglob("*.backup"))
    # A run with other options has no part in it.
    status, _, err = command(*arguments[:-1], "5", "--resume", "--out", out)
    assert status == 2
    assert err.startswith(f"error: {out}: no interrupted run with these options")

    status, _, err = command(*arguments, "--resume", "--out", out)
    assert status == 0, err
    assert _results(out) == _results(tmp_path / "whole")
    assert not list(out.glob("interrupted-*"))


def test_resume_is_refused_with_a_study(command):
    status, _, err = command("--study", "--resume")
    assert (status, err) == (
        2,
        "error: --resume cannot be used with --study, which always goes on from its "
        "files\n",
    )


class TestBackupFolder:
    def test_two_at_once_have_one_each(self, tmp_path):
        with backup_folder(tmp_path, {"seed": 1}, False) as one:
            with backup_folder(tmp_path, {"seed": 1}, False) as two:
                assert one != two
            assert one.is_dir()
        assert not list(tmp_path.iterdir())

    def test_backups_stay_after_an_error(self, tmp_path):
        def run():
            with backup_folder(tmp_path, {"seed": 1}, False) as folder:
                (folder / "file").write_text("")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run()
        with backup_folder(tmp_path, {"seed": 1}, True) as again:
            assert (again / "file").is_file()
        assert not list(tmp_path.iterdir())
        with (
            pytest.raises(InputError, match="no interrupted run with these options"),
            backup_folder(tmp_path, {"seed": 1}, True),
        ):
            pass

    def test_an_empty_one_is_removed_after_an_error(self, tmp_path):
        with (
            pytest.raises(InputError, match="no data"),
            backup_folder(tmp_path / "new", {"seed": 1}, False),
        ):
            raise InputError("no data")
        assert not list(tmp_path.iterdir())
