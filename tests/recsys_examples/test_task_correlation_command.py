"""The command line: a study end to end, and errors."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from recsys_examples.task_correlation.__main__ import NAMES, main
from recsys_examples.task_correlation.settings import BOTTOM, MODELS
from tests.support import processes

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "recsys_examples.task_correlation"]
# Enough runs for the claims to be checked, but only 3 steps.
TINY = ["--quick", "--runs", "5", "--steps", "3", "--seed", "4"]
WRITTEN = {"results.jsonl", "metrics.json", "task_correlation.png", "report.html"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The output folder of a study that ran in a subprocess."""
    out = tmp_path_factory.mktemp("out") / "new" / "study"
    done = processes.run([*COMMAND, *TINY, "--out", out], cwd=out.parent.parent)
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

    def test_report(self, out):
        record = json.loads((out / "metrics.json").read_text())
        text = (out / "report.html").read_text()
        for cells in record["results"].values():
            for cell in cells.values():
                shown = f"{cell['mean']:.4g} ± {cell['standard_deviation']:.2g}"
                assert f">{shown}</td>" in text
        assert "task correlation" in text  # the picture's caption

    def test_output(self, out):
        output = (out.parent / "stdout.txt").read_text()
        assert "MMoE: 14,818 parameters, width 16" in output
        assert "40/40" in output  # 5 runs of 4 models at 2 correlations
        assert re.search("┃ +shared bottom ┃ +OMoE ┃ +MMoE ┃ +PLE ┃", output)
        for p in ("0", "1"):
            assert re.search(
                rf"│ p = {p} │( +\d+\.\d{{4}} ± \d+\.\d{{4}} │){{4}}", output
            )
        claims = re.findall(r"^([1-4])\. .*: (true|false)$", output, flags=re.MULTILINE)
        assert [number for number, _ in claims] == ["1", "2", "3", "4"]
        assert re.search(
            r"^   p = 0, OMoE: [+-]\d.*\[.*\]$", output, flags=re.MULTILINE
        )
        assert f"Written to {out}" in output
        errors = (out.parent / "stderr.txt").read_text()
        assert "Traceback" not in errors
        assert "Warning" not in errors

    def test_metrics(self, out):
        text = (out / "metrics.json").read_text()
        # Strict JSON, without NaN.
        record = json.loads(text, parse_constant=pytest.fail)
        assert record["seed"] == record["arguments"]["seed"] == 4
        assert record["arguments"]["out"] == str(out)
        assert record["settings"]["steps"] == 3
        assert record["settings"]["recipe"]["dimension"] == 100
        assert record["versions"]["keras"] == version("keras")
        assert set(record["versions"]) == {
            *("python", "keras-moe", "keras", "tensorflow", "numpy")
        }
        sizes = [size["parameters"] for size in record["sizes"].values()]
        assert max(sizes) / min(sizes) < 1.01
        assert list(record["results"]) == list(MODELS)
        for found in record["results"].values():
            assert list(found) == ["0", "1"]
            for cell in found.values():
                assert len(set(cell["losses"])) == 5
                assert cell["mean"] == pytest.approx(np.mean(cell["losses"]))
                expected = np.std(cell["losses"], ddof=1)
                assert cell["standard_deviation"] == pytest.approx(expected)
                assert cell["learning_rate"] == 0.01
        assert [claim["holds"] in (True, False) for claim in record["claims"]] == (
            [True] * 4
        )

    def test_results(self, out):
        lines = (out / "results.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["seed"] == 4
        assert len(lines) == 1 + 40

    def test_picture(self, out):
        picture = plt.imread(out / "task_correlation.png", format="png")
        height, width = picture.shape[:2]
        assert 300 <= height <= 1200
        assert 500 <= width <= 2000
        grey = picture[..., :3].mean(axis=-1)
        assert len(np.unique(grey.round(2))) > 20
        assert 0.01 < np.mean(grey < 0.9) < 0.9


@pytest.mark.long
def test_an_interrupted_study_resumes_in_two_processes(out, tmp_path):
    """The last results of the shared bottom are missing; the last line is cut off."""
    lines = (out / "results.jsonl").read_text().splitlines()
    gone = [line for line in lines[-16:] if f'"{BOTTOM}"' in line]
    assert len(gone) == 4
    stopped = tmp_path / "study"
    stopped.mkdir()
    kept = [line for line in lines if line not in gone]
    (stopped / "results.jsonl").write_text("\n".join([*kept, gone[0][:30]]))
    done = processes.run(
        [*COMMAND, *TINY, "--out", stopped, "--resume", "--processes", "2"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(os.listdir(stopped)) == WRITTEN
    before, after = (
        json.loads((folder / "metrics.json").read_text()) for folder in (out, stopped)
    )
    assert after["claims"] == before["claims"]
    assert after["results"] == before["results"]
    found = (stopped / "results.jsonl").read_text().splitlines()
    assert found[: len(kept)] == kept
    assert len(found) == len(lines)


@pytest.mark.long
def test_a_terminated_study_ends_with_its_processes(tmp_path):
    out = tmp_path / "study"
    # In a new process group, by which remaining processes are found.
    run = subprocess.Popen(
        [sys.executable, *COMMAND, "--quick", "--processes", "2", "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    with run.stdout:
        assert any(line.startswith("PLE: ") for line in run.stdout)
        time.sleep(2)  # the workers are starting, with minutes of work
        run.terminate()
        assert run.wait(timeout=120) == 130
    deadline = time.monotonic() + 30
    while _is_alive(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(run.pid)
    # The results file can be resumed.
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0])


def _is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class TestErrors:
    """Status 2 and one line on stderr, before any training or overwriting."""

    def test_a_folder_with_results(self, out, command):
        before = (out / "results.jsonl").read_bytes()
        status, _, err = command(*TINY, "--out", out)
        assert status == 2
        assert err.startswith(f"error: {out / 'results.jsonl'} holds the results of a")
        assert len(err.splitlines()) == 1
        assert (out / "results.jsonl").read_bytes() == before

    def test_resume_with_other_settings(self, out, command):
        status, _, err = command(*TINY, "--steps", 9, "--out", out, "--resume")
        assert status == 2
        assert "these results were made with steps = 3, this study has 9" in err
        assert len(err.splitlines()) == 1

    def test_resume_without_results(self, tmp_path, command):
        status, _, err = command("--out", tmp_path / "absent", "--resume")
        assert status == 2
        assert re.fullmatch(r"error: [^\n]*no study to resume[^\n]*\n", err)
        assert os.listdir(tmp_path) == []

    def test_damaged_results(self, out, tmp_path, command):
        lines = (out / "results.jsonl").read_text().splitlines()
        lines[7] = lines[7].replace("losses", "loses")
        (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
        status, _, err = command(*TINY, "--out", tmp_path, "--resume")
        assert status == 2
        assert err.startswith(f"error: {tmp_path / 'results.jsonl'}, line 8: ")
        assert len(err.splitlines()) == 1

    def test_output_folder_is_a_file(self, tmp_path, command):
        place = tmp_path / "file"
        place.write_text("kept")
        status, _, err = command("--out", place)
        assert status == 2
        assert re.fullmatch(r"error: [^\n]*\n", err)
        assert str(place) in err
        assert place.read_text() == "kept"

    def test_output_folder_with_too_long_a_name(self, command, tmp_path):
        status, _, err = command("--out", tmp_path / ("y" * 300) / "z")
        assert status == 2
        assert err.startswith("error: cannot write to the output folder ")
        assert len(err.splitlines()) == 1

    def test_another_backend(self, command, monkeypatch):
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        status, _, err = command("--quick")
        assert status == 2
        assert err.startswith(
            "error: the study's training loop needs KERAS_BACKEND=tensorflow"
        )
        assert len(err.splitlines()) == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--runs", "1"],
            ["--runs", "many"],
            ["--correlations", "1.5"],
            ["--correlations", "nan"],
            ["--correlations", "half"],
            ["--correlations"],
            ["--models", "cgc"],
            ["--steps", "0"],
            ["--learning-rates", "0"],
            ["--learning-rates", "inf"],
            ["--sines", "-1"],
            ["--scale", "-1"],
            ["--noise", "-0.1"],
            ["--batch-size", "0"],
            ["--seed", "-1"],
            ["--processes", "0"],
        ],
        ids=" ".join,
    )
    def test_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert f"error: argument {arguments[0]}: " in capsys.readouterr().err

    def test_in_a_subprocess(self, tmp_path):
        done = processes.run([*COMMAND, "--resume", "--out", "absent"], cwd=tmp_path)
        assert done.returncode == 2
        assert re.fullmatch(
            r"error: absent/results.jsonl: no study [^\n]*\n", done.stderr
        )
        assert os.listdir(tmp_path) == []


def test_names_of_models():
    assert list(NAMES) == ["shared-bottom", "omoe", "mmoe", "ple"]
