"""`--resume`: an interrupted run ends with the results of one that was not."""

import json

import pytest

from recsys_examples.movielens import training
from recsys_examples.two_stage import pipeline
from recsys_examples.two_stage.__main__ import main
from tests.recsys_examples.test_movielens_command import write_csv
from tests.support import processes

SMALL = ("--quick", "--candidates", "20", "--seed", "4")
RESULTS = ("results", "chosen", "funnel")


@pytest.fixture
def command(capfd):
    return processes.in_this_process(main, capfd)


def _results(out):
    (path,) = out.glob("*/metrics.json")
    found = json.loads(path.read_text())
    return {name: found[name] for name in RESULTS}


@pytest.mark.usefixtures("eager_training")
@pytest.mark.long
def test_an_interrupted_run_goes_on(movielens, tmp_path, monkeypatch, command):
    folder = write_csv(tmp_path / "ml", movielens, users=8)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_BACKUPS", 0.0)
    arguments = (*SMALL, "--data-dir", folder)
    status, _, err = command(*arguments, "--out", tmp_path / "whole")
    assert status == 0, err
    assert not list((tmp_path / "whole").glob("interrupted-*"))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as interrupted:  # between the two rankers
        interrupted.setattr(pipeline.ValidationTuner, "choose", interrupt)
        status, _, err = command(*arguments, "--out", out)
        assert status == 130
        assert "--resume goes on" in err
    (left,) = out.iterdir()
    backups = {path.parent.name for path in left.rglob("*.backup")}
    assert {"retrieval_trained", "ranker_on_validation"} <= backups

    status, _, err = command(*arguments, "--resume", "--out", out)
    assert status == 0, err
    assert _results(out) == _results(tmp_path / "whole")
    assert not list(out.glob("interrupted-*"))
