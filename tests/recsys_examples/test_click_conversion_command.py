"""The command line: a study end to end, resuming, the map, and errors."""

import json
import os
import re
import shutil
from importlib.metadata import version

import pytest

from recsys_examples.click_conversion import regimes
from recsys_examples.click_conversion.__main__ import LOGS, NAMES, PROFILES, main
from tests.support import click_logs, processes

COMMAND = ["-m", "recsys_examples.click_conversion"]
TINY = ["--profile", "tiny", "--models", "sharedbottom", "esmm", "--workers", "1"]
CHAIN = [*TINY, "--data", "simulator"]
WRITTEN = {"results.jsonl", "tables.md", "metrics.json", "report.html"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The output folder of a study that ran in a subprocess."""
    out = tmp_path_factory.mktemp("out") / "new" / "study"
    done = processes.run([*COMMAND, *CHAIN, "--out", out], cwd=out.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (out.parent / "stdout.txt").write_text(done.stdout)
    (out.parent / "stderr.txt").write_text(done.stderr)
    return out


@pytest.fixture
def command(capfd):
    """Run the command in this process; return status, stdout and stderr."""
    return processes.in_this_process(main, capfd)


class TestStudy:
    def test_files(self, out):
        assert set(os.listdir(out)) == WRITTEN

    def test_output(self, out):
        output = (out.parent / "stdout.txt").read_text()
        assert re.search("┃ +SharedBottom ┃ +ESMM ┃", output)
        assert re.search(
            r"│ CVR, all rows: AUC +│( +\d+\.\d{4} ± \d+\.\d{4} │){2}", output
        )
        assert "simulated impressions, no bias: better than SharedBottom" in output
        assert f"on {os.cpu_count()} cores" in output
        errors = (out.parent / "stderr.txt").read_text()
        assert "Traceback" not in errors
        assert "Warning" not in errors

    def test_results(self, out):
        first, *lines = (out / "results.jsonl").read_text().splitlines()
        depends_on = json.loads(first)
        assert depends_on["versions"]["keras"] == version("keras")
        assert depends_on["budget"]["learning_rates"] == [0.01]
        # 3 sources, 2 models: one tuning run and two seeds.
        assert len(lines) == 3 * 2 * 3

    def test_tables_have_the_results_on_disk(self, out):
        values = []
        for line in (out / "results.jsonl").read_text().splitlines()[1:]:
            record = json.loads(line, parse_constant=pytest.fail)
            job = record["job"]
            if job["source"] == "no_bias" and job["model"] == "ESMM" and job["epochs"]:
                values.append(record["outcome"]["values"]["first_auc"])
        mean = f"{sum(values) / 2:.4f} ± "
        tables = (out / "tables.md").read_text()
        assert mean in tables
        assert "| click: AUC" in tables
        page = (out / "report.html").read_text()
        assert mean in page
        titles = [line for line in tables.splitlines() if ": 2 seeds, " in line]
        assert len(titles) == 3
        assert all(f"<h2>{title}</h2>" in page for title in titles)
        assert "better than SharedBottom" in page


@pytest.mark.long
def test_an_interrupted_study_resumes(out, tmp_path):
    lines = (out / "results.jsonl").read_text().splitlines()
    kept = lines[:-3]
    stopped = tmp_path / "study"
    stopped.mkdir()
    (stopped / "results.jsonl").write_text("\n".join([*kept, lines[-3][:30]]))
    done = processes.run([*COMMAND, *CHAIN, "--out", stopped, "--resume"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = (stopped / "results.jsonl").read_text().splitlines()
    assert found[: len(kept)] == kept
    assert len(found) == len(lines)
    for old, new in zip(lines[1:], found[1:], strict=True):
        old, new = json.loads(old), json.loads(new)
        assert old["job"] == new["job"]
        assert old["outcome"]["values"] == pytest.approx(new["outcome"]["values"])


def test_a_finished_study_prints_its_tables_without_runs(out, tmp_path):
    finished = tmp_path / "study"
    shutil.copytree(out, finished)
    before = (finished / "results.jsonl").read_bytes()
    done = processes.run(
        [*COMMAND, *CHAIN, "--out", finished, "--resume"], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (finished / "results.jsonl").read_bytes() == before
    assert (finished / "tables.md").read_text() == (out / "tables.md").read_text()


def test_files(tmp_path):
    """The same models on batches of a public log; others in the tests of training."""
    click_logs.write("kuairand", tmp_path / "data", rows=150)
    arguments = [*TINY, "--data", "kuairand", "--data-dir", tmp_path / "data"]
    done = processes.run(
        [*COMMAND, *arguments, "--max-buckets", "16", "--out", tmp_path / "out"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "click: AUC" in done.stdout
    assert set(os.listdir(tmp_path / "out")) == WRITTEN


def test_map(tmp_path, command, monkeypatch):
    """Two cells of the map; the picture is beside the tables."""
    chosen = [c for c in regimes.cells(600) if c.factor == regimes.CONFLICT_FACTOR]
    monkeypatch.setattr(regimes, "cells", lambda rows, factors: chosen[:2])
    status, printed, err = command(
        *("map", "--profile", "tiny", "--seeds", 2, "--workers", 1),
        *("--out", tmp_path / "map"),
    )
    assert status == 0, err
    assert set(os.listdir(tmp_path / "map")) == {*WRITTEN, "mixtures.png"}
    page = (tmp_path / "map" / "report.html").read_text()
    assert page.count("data:image/png") == 1
    assert "correlation of the tasks" in printed
    assert "MMoE: above the shared bottom in " in printed


class TestErrors:
    """Status 2 and one line on stderr, before any training or overwriting."""

    @pytest.fixture
    def fails(self, command):
        def call(*arguments):
            status, _, err = command(*arguments)
            assert status == 2
            assert len(err.splitlines()) == 1
            return err

        return call

    def test_unknown_loss_weighting(self, fails, tmp_path):
        err = fails(*CHAIN, "--loss-weighting", "best", "--out", tmp_path / "out")
        assert err.startswith("error: --loss-weighting: must be one of aligned_mtl, ")
        assert err.endswith("; got 'best'\n")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", LOGS)
    def test_missing_folder(self, name, fails, tmp_path):
        err = fails("--data", name, "--data-dir", tmp_path / "absent")
        assert f"--data-dir: must be a folder; got {tmp_path / 'absent'}" in err

    def test_no_folder(self, fails):
        err = fails("--data", "kuairand")
        assert "--data-dir: must be given with --data kuairand; got none" in err

    def test_a_folder_without_a_log(self, fails, tmp_path):
        err = fails("--data-dir", tmp_path)
        assert "--data-dir: must be given only with --data ali_ccp" in err

    def test_a_log_and_other_data(self, fails, tmp_path):
        err = fails("--data", "kuairand", "rand_hie", "--data-dir", tmp_path)
        assert "--data: must be one of ali_ccp, kuairand, aliexpress alone" in err

    def test_missing_files(self, fails, tmp_path):
        err = fails("--data", "kuairand", "--data-dir", tmp_path, "--out", tmp_path)
        assert "pure.csv: missing" in err
        assert os.listdir(tmp_path) == []

    def test_missing_column(self, fails, tmp_path):
        data = tmp_path / "data"
        click_logs.write("aliexpress", data, rows=5)
        path = data / "AliExpress_NL" / "train.csv"
        path.write_text(path.read_text().replace("numerical_7,", "other,", 1))
        err = fails(
            *("--data", "aliexpress", "--data-dir", data, "--out", tmp_path / "out")
        )
        assert f"{path}, line 1, column 'numerical_7': missing" in err
        assert not (tmp_path / "out").exists()

    def test_a_folder_with_results(self, out, fails):
        before = (out / "results.jsonl").read_bytes()
        err = fails(*CHAIN, "--out", out)
        assert "holds the results of a study: add --resume" in err
        assert (out / "results.jsonl").read_bytes() == before

    def test_resume_with_another_weighting(self, out, fails):
        err = fails(*CHAIN, "--out", out, "--resume", "--loss-weighting", "rlw")
        assert "were made with loss_weighting = None, this study has rlw" in err

    def test_resume_without_results(self, fails, tmp_path):
        err = fails(*CHAIN, "--out", tmp_path / "absent", "--resume")
        assert "no study to resume" in err
        assert os.listdir(tmp_path) == []

    def test_another_backend(self, fails, monkeypatch):
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        assert "the example's training loop needs KERAS_BACKEND=tensorflow" in fails()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--data", "criteo"],
            ["--models", "dbmtl"],
            ["--seeds", "1"],
            ["--profile", "huge"],
            ["--workers", "0"],
            ["--max-rows", "0"],
            ["--max-buckets", "1"],
            ["--seed", "-1"],
        ],
        ids=" ".join,
    )
    def test_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert f"error: argument {arguments[0]}: " in capsys.readouterr().err


def test_names():
    from recsys_examples.click_conversion import profiles

    assert list(NAMES) == [
        *("single-task", "sharedbottom", "mmoe", "ple"),
        *("esmm", "escm2-ipw", "escm2-dr", "aitm"),
    ]
    assert set(PROFILES) == set(profiles.PROFILES) == set(regimes.PLANS)
    assert (*("simulator", "rand_hie"), *LOGS) == profiles.DATA
