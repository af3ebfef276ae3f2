"""`keras_moe.report`: one page that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers, multitask
from keras_moe.callbacks import ExpertMonitor
from tests.support import processes
from tests.support.browser import (
    DESK,
    PHONE,
    browser,
    needs_browser,
    overflow,
    page_of,
)

TASKS = ["click", "stars"]
RECORD = {
    "results": {
        "MMoE": {"ndcg@10": 0.1078, "auc": None},
        "popularity": {"ndcg@10": 0.0437},
    },
    "seed": 3,
    "data": "<b>movies</b> & more",
    "settings": {"units": [8, 4]},
    "warnings": ["times are dates"],
}


class Page(HTMLParser):
    """Collects the tags that are open, all addresses, and the text."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text, self.tags = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        names = ("src", "href", "srcset", "data")
        self.addresses += [v for k, v in attributes if k in names]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(RECORD))
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    inputs = keras.Input((4,))
    hidden = layers.MoE(4, (8, 4), name="moe")(inputs)
    shared = layers.MMoE(3, 5, TASKS, name="mmoe")(hidden)
    outputs = {task: layers.Tower(())(shared[task]) for task in TASKS}
    model = multitask.MultiTaskModel(inputs, outputs)
    model.compile("adam", "mse")
    y = {task: x[:, :1] for task in TASKS}
    monitor = ExpertMonitor(x, y, file=folder / "experts.jsonl")
    model.fit(x, y, epochs=2, callbacks=[monitor], verbose=0)
    (folder / "curves.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return folder


def test_the_page(run):
    path = keras_moe.report(run)
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert not page.open
    for part in ("a <run>", "0.1078", "popularity", "<b>movies</b> & more", "moe"):
        assert part in page.text
    assert "times are dates" in page.text
    assert "click, stars" in page.text
    # Pictures are inside: the loads, gates, similarities, the conflict, a file.
    assert len(page.addresses) == 2 + 1 + 2 + 1 + 1
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "script" not in page.tags
    assert not re.search(r"https?://", text)
    assert 'name="viewport"' in text


@needs_browser
def test_the_page_in_a_browser(run, tmp_path):
    address = keras_moe.report(run, tmp_path / "report.html").as_uri()
    with browser() as started:
        for size in (PHONE, DESK):
            with page_of(started, size) as page:
                page.goto(address)
                assert overflow(page) <= 0
                assert page.get_by_role("heading", level=2).count() >= 4
                assert "a <run>" in page.title()
                pictures = page.locator("img").all()
                # The last is an SVG without a size.
                assert len(pictures) > 5
                for picture in pictures[:-1]:
                    assert picture.evaluate("image => image.naturalWidth") > 100
                    assert picture.bounding_box()["width"] <= size[0]
                remote = [url for url in page.requested if not url.startswith("data:")]
                assert remote == [address]


def test_signs_of_collapse_are_on_it(run, tmp_path):
    lines = (run / "experts.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["mixtures"]["moe"] |= {
        "usage": [[0.5, 0.5, 0.0, 0.0]],
        "relative_usage": [2.0, 2.0, 0.0, 0.0],
    }
    (tmp_path / "experts.jsonl").write_text(json.dumps(last) + "\n")
    text = Page(keras_moe.report(tmp_path, tmp_path / "x.html").read_text()).text
    assert "dead expert: moe: experts 2, 3 have less than 1%" in text


def test_the_command(run, tmp_path):
    out = tmp_path / "page.html"
    command = ["-m", "keras_moe.report"]
    done = processes.run([*command, str(run), "--out", str(out)], cwd=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"Written to {out}"
    assert "Experts" in Page(out.read_text()).text
    done = processes.run([*command, str(tmp_path)], cwd=None)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: `run` must have a file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", "\xff"),
        ("experts.jsonl", '{"epoch": 0\n'),
        ("experts.jsonl", "{}\n"),
        ("experts.jsonl", '{"epoch":0,"step":1,"mixtures":{"moe":{"usage":1}}}\n'),
    ],
)
def test_damaged_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: .* and run again"):
        keras_moe.report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        keras_moe.report(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file"):
        keras_moe.report(tmp_path / "file")


def test_without_matplotlib(run, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        keras_moe.report(run)


def test_results_of_other_forms(tmp_path):
    for results, shown in (
        ({"PLE": {"auc": [0.7, 0.8], "by": {"age": 1}}}, "[0.7, 0.8]"),
        ({"auc": 0.71}, "0.71"),
        ([{"auc": 0.72}], "0.72"),
    ):
        (tmp_path / "metrics.json").write_text(json.dumps({"results": results}))
        assert shown in Page(keras_moe.report(tmp_path).read_text()).text


def test_tables_and_findings(tmp_path):
    table = {
        "title": "Group <1>",
        "columns": ["", "AUC"],
        "rows": [["MMoE", "0.9431 ± 0.0012"], ["PLE", "-0.01 (3e-05) *"]],
    }
    record = {"tables": [table], "findings": ["PLE is <best>"], "seed": 3}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    html = keras_moe.report(tmp_path).read_text()
    for cell in ("0.9431 ± 0.0012", "-0.01 (3e-05) *"):
        assert f'<td class="number">{cell}</td>' in html
    assert "<td>PLE</td>" in html
    page = Page(html)
    for part in ("Group <1>", "AUC", "PLE is <best>", "seed"):
        assert page.text.count(part) == 1


@pytest.mark.parametrize(
    "record",
    [
        {"tables": [{"title": "a", "columns": ["b", "c"], "rows": [["d"]]}]},
        {"tables": [{"title": "a", "rows": []}]},
        {"tables": {"a": 1}},
        {"tables": [{"title": 1, "columns": [], "rows": []}]},
        {"findings": "all is well"},
    ],
)
def test_tables_that_are_none(record, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"metrics\.json: `tables` must be a list"):
        keras_moe.report(tmp_path)


def test_half_a_line_and_an_earlier_model(run, tmp_path):
    """A process was killed while it wrote; before, a model of three experts."""
    lines = (run / "experts.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    for name in ("usage", "relative_usage", "load"):
        value = np.array(first["mixtures"]["moe"][name])
        first["mixtures"]["moe"][name] = value[..., :3].tolist()
    text = "\n".join([json.dumps(first), *lines, lines[-1][:40]])
    (tmp_path / "experts.jsonl").write_text(text)
    assert "load of the experts" in keras_moe.report(tmp_path).read_text()
