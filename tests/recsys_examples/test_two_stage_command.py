"""The command line: files of a run, output, and errors."""

import json
import os
import re
from dataclasses import replace
from importlib.metadata import version

import matplotlib.pyplot as plt
import numpy as np
import pytest

from recsys_examples.two_stage import pictures, pipeline, study
from recsys_examples.two_stage.__main__ import METRICS, main
from recsys_examples.two_stage.latency_command import LATENCY, SAVED_MODELS
from recsys_examples.two_stage.study import FULL, NAMES, paired
from tests.recsys_examples.test_movielens_command import write_csv
from tests.support import processes

PICTURES = ["diversity.png", "funnel.png"]
MODELS = ("saved_model", "full_catalogue", "ranker_of_all")
WRITTEN = {"metrics.json", "report.html", *MODELS, *PICTURES}
SMALL = ("--quick", "--candidates", "20")


@pytest.fixture(scope="module")
def data_dir(movielens, tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "ml", movielens)


@pytest.fixture
def command(capfd):
    """Run the command in this process; return status, stdout and stderr."""
    return processes.in_this_process(main, capfd)


@pytest.fixture(scope="module")
def done(data_dir, tmp_path_factory):
    """A run in a subprocess."""
    out = tmp_path_factory.mktemp("out") / "runs"
    command = ["-m", "recsys_examples.two_stage", *SMALL, "--seed", "3"]
    done = processes.run([*command, "--data-dir", data_dir, "--out", out], data_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = out.iterdir()
    return run, done


@pytest.fixture(scope="module")
def run(done):
    return done[0]


class TestRun:
    def test_files(self, run):
        assert set(os.listdir(run)) == WRITTEN
        for folder in MODELS:
            assert (run / folder / "saved_model.pb").is_file()

    def test_output(self, done):
        run, printed = done
        assert "ml-csv, first 25 users" in printed.stdout
        assert f"Written to {run}" in printed.stdout
        for heading in METRICS.values():
            assert heading in printed.stdout
        assert re.search("┃ +two stages ┃ +full catalogue ┃", printed.stdout)
        assert "Warning" not in printed.stderr
        assert "Traceback" not in printed.stderr

    def test_metrics(self, run, data_dir):
        text = (run / "metrics.json").read_text()
        record = json.loads(text, parse_constant=pytest.fail)
        assert record["seed"] == record["arguments"]["seed"] == 3
        assert record["arguments"]["data_dir"] == str(data_dir)
        assert record["settings"]["candidates"] == 20
        assert record["settings"]["stack"] == "keras-rs"
        assert record["versions"]["keras-rs"] == version("keras-rs")
        assert record["versions"]["tensorflow"] == version("tensorflow")
        assert set(record["results"]) == {"two stages", "full catalogue"}
        assert set(record["results"]["two stages"]) >= set(METRICS)
        assert 0 < record["results"]["full catalogue"]["ndcg@10"] < 1
        assert set(record["chosen"]["fusion"]) == {"like", "rating", "diversity"}
        assert list(record["funnel"]) == ["10", "20", "50"]
        assert 0 < len(record["users"]) <= 25
        assert record["warnings"] == []

    @pytest.mark.parametrize("name", PICTURES)
    def test_pictures(self, run, name):
        picture = plt.imread(run / name, format="png")
        height, width = picture.shape[:2]
        assert 300 <= height <= 1200
        assert 500 <= width <= 2000
        grey = picture[..., :3].mean(axis=-1)
        assert len(np.unique(grey.round(2))) > 20
        assert 0.01 < np.mean(grey < 0.9) < 0.9


class TestRecommend:
    def rows(self, output):
        return [
            [cell.strip() for cell in line.strip("│").split("│")]
            for line in output.splitlines()
            if line.startswith("│")
        ]

    def test_seen_movies_are_excluded(self, run, data_dir, command):
        status, output, err = command("recommend", "--user", 7, "--model", run)
        assert (status, err) == (0, "")
        assert "For user 7" in output
        rows = self.rows(output)
        assert [row[0] for row in rows] == [str(i) for i in range(1, 11)]
        ratings = (data_dir / "ratings.csv").read_text().splitlines()
        rated = [line.split(",")[1] for line in ratings if line.startswith("7,")]
        known = rated[: len(rated) - len(rated) // 10]
        for _, movie, title, score, watch, like, _ in rows:
            assert movie not in known
            assert title == f"Movie, The {(int(movie) - 1) // 3}th"
            assert np.isfinite(float(score))
            assert 0 < float(watch) < 1
            assert 0 < float(like) < 1
        assert "score = watch (log odds) + a ln p(like) + b rating" in output

    def test_an_unknown_user_and_fewer_movies(self, run, command):
        status, output, _ = command(
            "recommend", "--user", 9999, "--model", run, "--k", "3"
        )
        assert status == 0
        assert "unknown user 9999" in output
        assert len(self.rows(output)) == 3


class TestLatency:
    def test_all_models_on_one_thread(self, run, command):
        status, output, err = command(
            *("latency", "--model", run, "--calls", "10", "--threads", "1")
        )
        assert (status, err) == (0, "")
        for heading in LATENCY.values():
            assert heading in output
        for other in ("first example", "its ranker on all"):
            assert re.search(rf"64 users: \d+\.\d\d of the time of {other}", output)
        found = json.loads((run / "latency.json").read_text())["1"]
        assert set(found) == set(SAVED_MODELS)
        for figures in found.values():
            assert 0 < figures["p50_ms"] <= figures["p99_ms"]
            assert figures["users_per_second"] == pytest.approx(
                64e3 / figures["batch_ms"]
            )
        (run / "latency.json").unlink()

    def test_a_folder_that_is_not_a_run(self, run, command):
        status, _, err = command("latency", "--model", run / "saved_model")
        assert status == 2
        assert "saved_model: not a run: found no saved_model" in err
        assert len(err.splitlines()) == 1


class TestStudy:
    @pytest.mark.usefixtures("eager_training")
    def test_resume(self, data_dir, tmp_path, monkeypatch, command):
        arguments = [
            *("--study", "--seeds", "1", *SMALL),
            *("--data-dir", data_dir, "--out", tmp_path),
        ]
        status, output, err = command(*arguments)
        assert (status, err) == (0, "")
        assert re.search(
            "┃ +".join([FULL, *NAMES.values()]).replace("┃", " +┃"), output
        )
        file = tmp_path / "study" / "results.jsonl"
        kept = file.read_bytes()
        assert len(kept.splitlines()) == 1 + 3

        status, _, err = command(*arguments)
        assert status == 2
        assert "add --resume to continue it" in err

        # Results in the file are not repeated, except for an incomplete last line.
        def none(*_, **__):
            raise AssertionError("trained again")

        for name in ("run_ranker", "fit_first_stages", "run_second_stage"):
            monkeypatch.setattr(study, name, none)
        status, again, _ = command(*arguments, "--resume")
        assert status == 0
        assert file.read_bytes() == kept
        table = [line for line in output.splitlines() if line.startswith("│")]
        assert [x for x in again.splitlines() if x.startswith("│")] == table
        file.write_bytes(kept[:-20])
        with pytest.raises(AssertionError, match="trained again"):
            command(*arguments, "--resume")

    def test_resume_with_other_data(self, data_dir, tmp_path, command):
        folder = tmp_path / "study"
        folder.mkdir()
        (folder / "results.jsonl").write_text('{"data": "other"}\n')
        status, _, err = command(
            *("--study", "--resume", *SMALL, "--data-dir", data_dir, "--out", tmp_path)
        )
        assert status == 2
        assert "these results were made with data = other" in err

    def test_paired_standard_error(self):
        ours = [{"ndcg@10": value} for value in (0.3, 0.5, 0.4)]
        # Differences 0.1, 0.3, 0.2: mean 0.2, deviation 0.1, error 0.1 / sqrt(3).
        mean, error = paired(ours, [0.2, 0.2, 0.2])
        assert mean == pytest.approx(0.2)
        assert error == pytest.approx(0.1 / np.sqrt(3))


@pytest.mark.parametrize("study", [[], ["--study"]], ids=["train", "study"])
def test_a_warning_for_an_order_by_movie(
    movielens, tmp_path, monkeypatch, command, study
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fit_first_stages", stop)
    monkeypatch.setattr("recsys_examples.two_stage.study.run_ranker", stop)
    ratings = movielens.ratings
    by_movie = ratings.assign(timestamp=ratings["movie_id"])
    folder = write_csv(tmp_path / "ml", replace(movielens, ratings=by_movie))
    arguments = (*SMALL, *study, "--data-dir", folder, "--out", tmp_path / "out")
    status, output, _ = command(*arguments)
    assert status == 130
    (warning,) = re.findall(r"^Warning: .*", output, re.MULTILINE)
    assert warning.endswith("meaningless for real use.")


class TestBadInput:
    @pytest.mark.parametrize("candidates", ["0", "-5", "9", "61"])
    @pytest.mark.parametrize("study", [[], ["--study"]], ids=["train", "study"])
    def test_candidates(self, data_dir, tmp_path, command, candidates, study):
        out = tmp_path / "out"
        status, _, err = command(
            *("--candidates", candidates, "--data-dir", data_dir, "--out", out, *study)
        )
        assert status == 2
        assert err == (
            "error: candidates must be from 10 (the length of a list) to 60 (the "
            f"number of movies); got {candidates}\n"
        )
        assert not out.exists()

    def test_no_data(self, tmp_path, command):
        status, _, err = command("--data-dir", tmp_path / "absent")
        assert status == 2
        assert err == f"error: {tmp_path / 'absent'}: the data folder does not exist\n"

    def test_resume_without_an_interrupted_run(self, data_dir, tmp_path, command):
        out = tmp_path / "out"
        arguments = ("--resume", *SMALL, "--data-dir", data_dir, "--out", out)
        status, _, err = command(*arguments)
        assert status == 2
        assert err.startswith(f"error: {out}: no interrupted run with these options")
        assert not out.exists()

    @pytest.mark.parametrize("verb", [["recommend", "--user", "7"], ["latency"]])
    def test_no_model(self, tmp_path, command, verb):
        status, _, err = command(*verb, "--model", tmp_path)
        assert status == 2
        assert re.fullmatch(r"error: [^\n]*: not a run or a SavedModel[^\n]*\n", err)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--stack", "faiss"],
            ["--ranker", "tower"],
            ["--candidates", "many"],
            ["--study", "--seeds", "0"],
            ["recommend", "--model", "x"],
            ["recommend", "--user", "7", "--model", "x", "--k", "11"],
            ["latency", "--model", "x", "--threads", "0"],
        ],
        ids=" ".join,
    )
    def test_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err


@pytest.mark.usefixtures("eager_training")
@pytest.mark.long
def test_nothing_is_written_when_interrupted(data_dir, tmp_path, monkeypatch, command):
    def draw(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "draw", draw)
    out = tmp_path / "out"
    status, _, err = command(*SMALL, "--data-dir", data_dir, "--out", out)
    assert status == 130
    assert err.startswith("interrupted: unfinished results were discarded")
    assert not out.exists()
