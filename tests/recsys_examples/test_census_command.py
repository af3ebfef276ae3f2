"""The command: its output, its results file and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys_examples.census_income.__main__ import main
from recsys_examples.census_income.data import DATA_VARIABLE
from tests.support import census_files, processes

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "recsys_examples.census_income"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return census_files.write_cut(
        tmp_path_factory.mktemp("data") / "census-income",
        census_files.make_rows(600, 1),
        census_files.make_rows(400, 2),
    ).parent


def call(out, *arguments, **environment):
    done = processes.run(
        [*COMMAND, "--out", out, *arguments], cwd=ROOT, timeout=500, **environment
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def records(out):
    """The first line of the results, and the runs."""
    lines = (out / "results.jsonl").read_text().splitlines()
    first, *runs = map(json.loads, lines)
    return first, runs


@pytest.fixture(scope="module")
def out(data_dir, tmp_path_factory):
    """Results of a run with one worker, resumed with two workers."""
    out = tmp_path_factory.mktemp("out") / "new"
    first = call(out, "--trials=1", "--seeds=1", "--workers=1", KERAS_MOE_DATA=data_dir)
    assert first.returncode == 0, first.stderr[-3000:]
    (out.parent / "first.txt").write_text(first.stdout)
    second = call(out, "--trials=1", "--seeds=2", "--resume", "--data-dir", data_dir)
    assert second.returncode == 0, second.stderr[-3000:]
    (out.parent / "second.txt").write_text(second.stdout)
    return out


class TestRun:
    def test_results_file(self, out):
        depends_on, runs = records(out)
        assert depends_on["data"]
        assert depends_on["versions"]["keras"]
        assert len(runs) == 2 * (1 + 2)
        first, second = runs[:4], runs[4:]
        assert {run["job"]["model"] for run in first} == {"shared bottom", "MMoE"}
        # The second command added the second seed of both models.
        assert {run["job"]["seed"] for run in second} == {1}
        for run in runs:
            assert run["job"]["group"] == "income"
            assert set(run["outcome"]["test"]) == {"income", "never_married"}

    def test_output(self, out):
        first = (out.parent / "first.txt").read_text()
        assert "34 of the 42 columns, 30 of them inputs" in first
        assert "rows: 600 training, 200 validation, 200 test" in first
        assert "4 runs: 1 search trials and 1 seeds for each model and group" in first
        assert "income, MMoE, trial 0: validation 0." in first
        assert "A paired test needs two or more seeds; got 1." in first
        second = (out.parent / "second.txt").read_text()
        assert "; 4 finished before; " in second
        assert second.count(": validation 0.") == 2
        assert "income, shared bottom, seed 1: validation 0." in second
        assert "Group 1, test AUC, mean ± standard deviation" in second
        assert "MMoE minus shared bottom: " in second

    def test_page(self, out):
        record = json.loads((out / "metrics.json").read_text())
        ours, papers = record["tables"]
        aucs = [run["outcome"]["test"]["income"] for run in records(out)[1]]
        best = max(float(row[2]) for row in ours["rows"])
        assert any(abs(best - auc) < 1e-4 for auc in aucs)
        assert record["plan"]["seeds"] == 2
        page = (out / "report.html").read_text()
        for text in (ours["title"], papers["title"], "MMoE minus shared bottom: "):
            assert text in page

    def test_the_papers_figures_have_their_own_table(self, out):
        ours, papers = (out.parent / "first.txt").read_text().split("in the paper")
        assert "with other columns and another budget" in papers
        assert "0.9359" in papers
        assert "0.9359" not in ours


@pytest.mark.long
def test_an_interrupted_run_keeps_what_is_finished(data_dir, out, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST", "KERAS_BACKEND"))
    }
    arguments = ["--out", tmp_path, "--data-dir", data_dir, "--trials=200"]
    with subprocess.Popen(
        [sys.executable, *COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Background jobs of a shell, and their children, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            next(line for line in process.stdout if ": validation 0." in line)
            # Like Ctrl-C in a terminal: to the workers as well.
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "finished runs are kept, and --resume continues" in errors
        assert "Traceback" not in errors
        assert_no_process_left(process.pid)
    _, kept = records(tmp_path)

    # The same runs with two workers instead of one: the results are equal.
    def by_job(runs):
        return {json.dumps(run["job"]): run["outcome"]["test"] for run in runs}

    again, before = by_job(kept), by_job(records(out)[1])
    common = again.keys() & before.keys()
    assert common
    assert all(again[job] == before[job] for job in common)


def assert_no_process_left(session):
    """The workers are in the session of their parent."""
    for _ in range(300):  # one minute, for slow machines
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("a worker outlived its parent")


@pytest.fixture
def command(capsys):
    """Run the command in this process; return status, stdout and stderr."""
    return processes.in_this_process(main, capsys)


class TestErrors:
    def test_no_data(self, command, monkeypatch):
        monkeypatch.delenv(DATA_VARIABLE, raising=False)
        status, output, error = command()
        assert status == 2
        assert output == ""
        assert error.startswith("error: no data folder: set --data-dir")
        assert error.count("\n") == 1

    def test_a_bad_line(self, command, tmp_path):
        rows = census_files.make_rows(5)
        rows[3]["label"] = "rich"
        census_files.write_official(tmp_path, rows, rows[:2])
        status, _, error = command("--data-dir", tmp_path, "--out", tmp_path / "out")
        assert status == 2
        assert error == (
            f"error: {tmp_path / 'census-income.data'}, line 4, column 'label': "
            "must be '- 50000.' or '50000+.'; got 'rich'\n"
        )
        assert not (tmp_path / "out").exists()

    def test_results_of_an_earlier_study(self, command, data_dir, out):
        before = (out / "results.jsonl").read_bytes()
        status, _, error = command("--data-dir", data_dir, "--out", out)
        assert status == 2
        assert error.startswith(f"error: {out / 'results.jsonl'} holds the results of")
        assert error.count("\n") == 1
        assert (out / "results.jsonl").read_bytes() == before

    def test_another_backend(self, command, monkeypatch, data_dir):
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        status, _, error = command("--data-dir", data_dir)
        assert status == 2
        assert error.startswith("error: the example needs KERAS_BACKEND=tensorflow")

    def test_output_is_a_file(self, command, data_dir, tmp_path):
        (tmp_path / "file").write_text("")
        status, _, error = command("--data-dir", data_dir, "--out", tmp_path / "file")
        assert status == 2
        assert "cannot write to the output folder" in error

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--trials", "0"],
            ["--seeds", "-1"],
            ["--workers", "0"],
            ["--seed", "x"],
            ["--groups", "marital"],
            ["--models", "MMoe"],
            ["--quick"],
        ],
    )
    def test_bad_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert arguments[0] in capsys.readouterr().err
