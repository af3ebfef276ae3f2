"""`serve`: the JSON endpoint over HTTP, and the page in a real browser."""

import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from recsys_examples.movielens import serve_command
from recsys_examples.movielens.__main__ import main
from recsys_examples.movielens.model import TASKS
from recsys_examples.movielens.recommendations import Choice, ExplainedModel
from recsys_examples.movielens.serving import export_saved_model
from tests.support import processes
from tests.support.browser import (
    DESK,
    PHONE,
    browser,
    needs_browser,
    overflow,
    page_of,
)

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).parents[2]
ATTACK = "<script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def exported(trained, windows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    export_saved_model(
        trained.fit.ranker,
        windows.before_test,
        windows.catalogue,
        folder / "saved_model",
    )
    return folder


@pytest.fixture(scope="module")
def model(exported):
    found = ExplainedModel(exported)
    # Titles are text of others.
    found.popular.append(Choice(4, f"{ATTACK} & more", 1999))
    return found


@contextmanager
def serving(model):
    """Serve a model in a thread; yield the address."""
    import uvicorn

    from recsys_examples.movielens.web.app import make_app

    server = uvicorn.Server(uvicorn.Config(make_app(model), log_level="warning"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(model):
    with serving(model) as address:
        yield address


def get(address, method="GET"):
    """Return the status, the headers and the text of a response."""
    request = urllib.request.Request(address, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


class TestEndpoint:
    def test_a_user(self, address, model):
        status, _, text = get(f"{address}/api/recommend?user=7&k=3")
        found = json.loads(text)
        expected = model.for_user(7, 3)
        assert status == 200
        assert found["user"] == 7
        assert found["gate_weights"] == expected.gate_weights
        assert found["mean_contributions"] == expected.mean_contributions
        assert len(found["movies"]) == 3
        for movie, other in zip(found["movies"], expected.movies, strict=True):
            assert movie["movie_id"] == other.movie_id
            assert movie["score"] == other.score
            assert movie["scores"] == other.scores
            assert movie["contributions"] == other.contributions
            assert ", ".join(movie["genres"]) == other.genres

    def test_the_order_follows_from_what_is_shown(self, address, trained):
        """The score of each movie, computed from its calibrated predictions."""
        found = json.loads(get(f"{address}/api/recommend?user=7&k=20")[2])
        slope, offset = (float(v) for v in trained.fit.ranker.calibration[:2])
        scores = [movie["score"] for movie in found["movies"]]
        assert scores == sorted(scores, reverse=True)
        for movie, score in zip(found["movies"], scores, strict=True):
            watch, like = movie["scores"]["watch"], movie["scores"]["like"]
            before = (np.log(watch / (1 - watch)) - offset) / slope  # log odds
            assert score == pytest.approx(
                np.log(1 / (1 + np.exp(-before))) + np.log(like), abs=1e-3
            )
        meaning = found["meaning"]
        assert "score = ln p(watch) + ln p(like)" in meaning["score"]
        assert "before calibration" in meaning["score"]
        assert "log odds of watch before calibration" in meaning["contributions"]

    def test_a_newcomer(self, address, model):
        _, _, text = get(f"{address}/api/recommend?movie=4&movie=10&movie=4&k=3")
        found = json.loads(text)
        assert found["user"] is None
        expected = [movie.movie_id for movie in model.for_newcomer([4, 10], 3).movies]
        assert [movie["movie_id"] for movie in found["movies"]] == expected
        status, _, text = get(f"{address}/api/recommend?newcomer=1")
        assert status == 200
        assert len(json.loads(text)["movies"]) == 10

    @pytest.mark.parametrize(
        ("query", "status", "error"),
        [
            ("", 400, "give `user` (an id), or `newcomer=1` and liked movies as"),
            ("user=7&movie=4", 400, "give `user`, or `newcomer` and `movie`, not both"),
            ("user=8888", 404, "`user` 8888 is not known to the model"),
            ("movie=4&movie=5", 404, "`movie` 5 is not in the catalogue"),
            ("user=7&k=0", 422, "`k`: should be greater than or equal to 1; got '0'"),
            ("user=7&k=51", 422, "`k`: should be less than or equal to 50; got '51'"),
            ("user=7&k=two", 422, "`k`: should be a valid integer"),
            ("user=-1", 422, "`user`: should be greater than or equal to 0"),
            ("user=9999999999999999999", 422, "`user`: should be less than or equal"),
            ("user=", 422, "`user`: should be a valid integer"),
            (
                "movie=" + "&movie=".join(["4"] * 21),
                422,
                "`movie`: choose at most 20 movies; got 21",
            ),
            ("user=7&user=9", 422, "`user` must be given once; got 2 values"),
            ("user=7&k=3&k=4&k=5", 422, "`k` must be given once; got 3 values"),
            ("usr=7", 422, "there is no parameter `usr`; there are user, newcomer"),
            ("user=" + "x" * 5000, 422, "`user`: should be a valid integer"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_errors(self, address, query, status, error):
        found, headers, text = get(f"{address}/api/recommend?{query}")
        assert found == status
        assert headers["Content-Type"] == "application/json"
        assert list(json.loads(text)) == ["error"]
        message = json.loads(text)["error"]
        assert message.startswith(error)
        assert len(message) < 300
        assert "\n" not in message
        # The page says the same.
        if query:
            found, _, text = get(f"{address}/?{query}")
            assert found == status
            assert f'role="alert">{message}</p>' in html.unescape(text)

    @pytest.mark.parametrize(
        "path",
        [
            *("/", "/?user=7", "/?user=8888", "/?k=0"),
            *("/api/recommend?user=7", "/api/recommend", "/api/experts", "/api/health"),
        ],
    )
    def test_head(self, address, path):
        """The status and the headers of GET, without a body."""
        status, headers, text = get(f"{address}{path}")
        found, same, empty = get(f"{address}{path}", "HEAD")
        assert (found, empty) == (status, "")
        assert text
        for name in ("Content-Type", "Content-Length", "Content-Security-Policy"):
            assert same[name] == headers[name]

    def test_other_addresses(self, address):
        assert json.loads(get(f"{address}/api/health")[2]) == {
            "status": "ok",
            "movies": 60,
            "experts": 2,
        }
        experts = json.loads(get(f"{address}/api/experts")[2])
        assert set(experts["weights"]) == {*TASKS}
        assert set(experts["lifts"]) == {"genre", "decade", "user"}
        assert (
            "/api/recommend"
            in json.loads(get(f"{address}/api/openapi.json")[2])["paths"]
        )
        status, _, text = get(f"{address}/api/none")
        assert (status, json.loads(text)) == (
            404,
            {"error": "GET /api/none: not found"},
        )
        status, _, text = get(f"{address}/api/recommend", "POST")
        assert status == 405
        assert "method not allowed" in json.loads(text)["error"]
        assert get(f"{address}/docs")[0] == 404

    def test_a_catalogue_smaller_than_the_limit(self, address, model, monkeypatch):
        monkeypatch.setattr(model, "num_movies", 20)
        status, _, text = get(f"{address}/api/recommend?user=7&k=21")
        assert status == 422
        assert "`k` must be at most 20, the size of the catalogue" in text

    def test_many_at_once(self, address):
        users = [1 + 2 * (i % 12) for i in range(48)]
        queries = [f"{address}/api/recommend?user={user}&k=5" for user in users]
        one_by_one = [get(query)[2] for query in queries[:12]]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda query: get(query)[2], queries))
        assert answers == one_by_one * 4
        assert len(set(one_by_one)) == 12

    def test_an_internal_error(self, model, monkeypatch, caplog):
        def broken(*_):
            raise RuntimeError("a fault")

        monkeypatch.setattr(model, "for_user", broken)
        with serving(model) as address:
            status, _, text = get(f"{address}/api/recommend?user=7")
        assert status == 500
        assert json.loads(text) == {
            "error": "internal error: see the log of the server"
        }
        assert "a fault" not in text

    def test_headers(self, address):
        headers = get(f"{address}/?user=7")[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


@needs_browser
class TestPage:
    @pytest.fixture(scope="class")
    @classmethod
    def started(cls):
        with browser() as started:
            yield started

    @pytest.fixture(params=[PHONE, DESK], ids=["phone", "desk"])
    def page(self, request, started, address, tmp_path):
        """The start page; afterwards, checks that hold for each page."""
        with page_of(started, request.param) as page:
            page.goto(address)
            yield page
            assert overflow(page) <= 0
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            assert (tmp_path / "page.png").stat().st_size > 10_000
            assert {url.split("/")[2] for url in page.requested if "://" in url} == {
                address.removeprefix("http://")
            }
            # Every field has a label.
            for field in page.locator("input:not([type=hidden])").all():
                assert field.evaluate("field => field.labels.length") == 1

    def submit(self, page, number):
        page.get_by_role("button", name="Recommend").nth(number).click()
        page.wait_for_load_state()

    def ticked(self, page):
        boxes = page.locator(".choices input:checked").all()
        return {box.get_attribute("value") for box in boxes}

    def test_a_known_user(self, page, model):
        page.get_by_label("User id").fill("7")
        page.get_by_label("Number of movies").first.fill("4")
        self.submit(page, 0)
        assert page.get_by_role("heading", name="For user 7").is_visible()
        expected = model.for_user(7, 4)
        titles = page.locator("ol.movies h3").all_inner_texts()
        assert titles == [
            f"{place}. {movie.title} ({movie.year or 'year unknown'})"
            for place, movie in enumerate(expected.movies, start=1)
        ]
        first = page.locator("ol.movies > li").first
        shown = first.locator("thead th").all_inner_texts()
        assert [text.split() for text in shown] == [
            ["score", f"{expected.movies[0].score:.2f}"],
            *([t, f"{expected.movies[0].scores[t]:.2f}"] for t in TASKS),
        ]
        # The order is that of the first number.
        columns = page.locator("thead th:first-child strong").all_inner_texts()
        assert len(columns) == 4
        assert columns == sorted(columns, key=float, reverse=True)
        text = page.locator("section[aria-labelledby=list]").inner_text()
        assert "sorted by score = ln p(watch) + ln p(like)" in text
        assert "log odds of watch before calibration" in text
        for expert in range(2):
            row = first.get_by_role("row", name=f"Expert {expert}")
            assert [text.strip() for text in row.locator("td").all_inner_texts()] == [
                f"{expected.movies[0].contributions[task][expert]:+.2f}"
                for task in TASKS
            ]
            for bar in row.locator("rect").all():
                assert bar.get_attribute("class") in ("plus", "minus")
        # The list is in view, also on a phone, and the form keeps what was asked for.
        assert page.locator("#list").evaluate(
            "heading => heading.getBoundingClientRect().top < innerHeight"
        )
        assert page.get_by_label("User id").input_value() == "7"

    def test_a_newcomer(self, page, model):
        page.get_by_label("Search").fill("the 1th")
        assert page.locator(".choices label:visible").count() == 1
        page.get_by_label("Movie, The 1th").check()
        page.get_by_label("Search").fill("the 3th")
        # What is ticked stays in sight.
        assert page.locator(".choices label:visible").count() == 2
        page.get_by_label("Movie, The 3th").check()
        self.submit(page, 1)
        assert page.get_by_role(
            "heading", name="For a newcomer who likes 2 of the movies"
        ).is_visible()
        assert page.locator("ol.movies > li").count() == 10
        titles = " ".join(page.locator("ol.movies h3").all_inner_texts())
        assert "The 1th" not in titles
        assert "The 3th" not in titles
        assert page.get_by_label("Movie, The 1th").is_checked()

    def test_a_cold_start(self, page, model):
        self.submit(page, 1)
        assert page.get_by_role("heading", name="For a newcomer").is_visible()
        expected = model.for_newcomer([], 10).movies[0].title
        assert expected in page.locator("ol.movies h3").first.inner_text()

    def test_an_unknown_user(self, page):
        page.get_by_label("User id").fill("8888")
        self.submit(page, 0)
        alert = page.get_by_role("alert")
        assert alert.inner_text() == "`user` 8888 is not known to the model"
        assert page.get_by_label("User id").input_value() == "8888"
        assert page.locator("ol.movies").count() == 0

    def test_k_too_large(self, page, address):
        field = page.get_by_label("Number of movies").first
        field.fill("51")
        assert not field.evaluate("field => field.validity.valid")
        page.goto(f"{address}/?user=7&k=51")
        assert (
            page.get_by_role("alert")
            .inner_text()
            .startswith("`k`: should be less than or equal to 50")
        )
        assert page.get_by_label("User id").input_value() == "7"
        field = page.get_by_label("Number of movies").first
        assert field.input_value() == "51"
        field.fill("3")
        self.submit(page, 0)
        assert page.locator("ol.movies > li").count() == 3

    def test_k_too_large_for_a_newcomer(self, page, address):
        page.goto(f"{address}/?newcomer=1&movie=10&movie=13&k=100")
        assert page.get_by_role("alert").count() == 1
        assert self.ticked(page) == {"10", "13"}
        page.get_by_label("Number of movies").nth(1).fill("3")
        self.submit(page, 1)
        assert page.get_by_role(
            "heading", name="For a newcomer who likes 2 of the movies"
        ).is_visible()

    def test_too_many_ticks(self, page):
        boxes = page.locator(".choices input:not([value='4'])")
        for i in range(21):
            boxes.nth(i).check()
        chosen = self.ticked(page)
        page.get_by_label("Number of movies").nth(1).fill("7")
        self.submit(page, 1)
        alert = page.get_by_role("alert")
        assert alert.inner_text() == "`movie`: choose at most 20 movies; got 21"
        assert self.ticked(page) == chosen
        assert len(chosen) == 21
        boxes.nth(20).uncheck()
        self.submit(page, 1)
        assert page.get_by_role("alert").count() == 0
        assert page.locator("ol.movies > li").count() == 7
        assert len(self.ticked(page)) == 20

    def test_two_users(self, page, address):
        page.goto(f"{address}/?user=7&user=9")
        alert = page.get_by_role("alert")
        assert alert.inner_text() == "`user` must be given once; got 2 values"
        assert page.locator("ol.movies").count() == 0

    def test_text_of_others(self, page, address):
        assert page.get_by_label(f"{ATTACK} & more").count() == 1
        attack = f"%22%3E{ATTACK}".replace(" ", "%20")
        page.goto(f"{address}/?user={attack}&movie={attack}&movie=10&k={attack}")
        assert "<script>" in page.get_by_role("alert").inner_text()
        # Only what is a number is kept in the form.
        assert page.get_by_label("User id").input_value() == ""
        assert page.get_by_label("Number of movies").first.input_value() == "10"
        assert self.ticked(page) == {"10"}
        assert page.title() == "movies and the experts behind them"

    def test_without_scripts(self, started, address):
        with page_of(started, PHONE, java_script_enabled=False) as page:
            page.goto(address)
            assert not page.get_by_label("Search").is_visible()
            page.get_by_label("Movie, The 1th").check()
            self.submit(page, 1)
            assert page.locator("ol.movies > li").count() == 10


class TestCommand:
    @pytest.fixture
    def command(self, capfd):
        return processes.in_this_process(main, capfd)

    def test_serve(self, exported):
        command = ["-m", "recsys_examples.movielens", "serve"]
        with subprocess.Popen(
            [sys.executable, *command, "--model", exported, "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as server:
            try:
                line = server.stdout.readline()
                found = re.match(r"Serving (http://127\.0\.0\.1:\d+) ", line)
                assert found, line
                assert get(f"{found[1]}/api/recommend?user=7")[0] == 200
                server.send_signal(signal.SIGINT)
                assert server.stdout.read().strip() == "Stopped."
                assert server.wait(60) == 0
            finally:
                server.kill()

    def test_a_port_in_use(self, command, exported):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            status, _, err = command("serve", "--model", exported, "--port", port)
        assert status == 2
        assert err == (
            f"error: --host 127.0.0.1 --port {port}: Address already in use\n"
        )

    def test_no_such_host(self, command, exported):
        status, _, err = command("serve", "--model", exported, "--host", "no host")
        assert status == 2
        assert re.fullmatch(r"error: --host no host: [^\n]+\n", err)

    @pytest.mark.parametrize("package", serve_command.PACKAGES)
    def test_a_missing_package(self, command, exported, monkeypatch, package):
        monkeypatch.setattr(
            serve_command.importlib.util,
            "find_spec",
            lambda name: None if name == package else name,
        )
        status, _, err = command("serve", "--model", exported)
        assert status == 2
        assert err == (f'error: serve needs {package}: run `pip install ".[serve]"`\n')

    def test_no_model(self, command, tmp_path):
        status, _, err = command("serve", "--model", tmp_path, "--port", "0")
        assert status == 2
        assert "not a run or a SavedModel" in err
