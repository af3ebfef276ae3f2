"""`keras_moe.report`: one page that needs nothing else."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest

import keras_moe
from keras_moe import layers, multitask
from keras_moe.callbacks import ExpertMonitor
from keras_moe.plots import _style
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
    "curves": {"loss": [2.5, 1.5], "val_loss": [2.25]},
    "crc32": "deadbeef",
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
    # Each once, not among the settings too.
    for part in ("times are dates", "val_loss", "2.25"):
        assert page.text.count(part) == 1
    assert "deadbeef" not in page.text
    assert "click, stars" in page.text
    # Pictures are inside: the loads, gates, similarities, the conflict, a file.
    assert len(page.addresses) == 2 + 1 + 2 + 1 + 1
    assert all(address.startswith("data:image/") for address in page.addresses)
    # Those that are drawn have few dots, as they are most of a page's size.
    drawn = [a for a in page.addresses if a.startswith("data:image/png")]
    pixels = [plt.imread(io.BytesIO(base64.b64decode(a[22:]))) for a in drawn]
    assert {picture.shape[:2] for picture in pixels} == {(495, 660)}
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
    assert "dead expert, epoch 2: moe: experts 2, 3 have less than 1%" in text


def observation(epoch, usage, *, rows=1000, top_k=1, gates=("router",), **more):
    """An observation of one mixture "moe", as a line of the file has it."""
    usage = np.asarray(usage, float)
    e = usage.shape[1]
    figures = {
        "gates": list(gates),
        "top_k": top_k,
        "rows": rows,
        "load": usage.mean(axis=0).tolist(),
        "load_cv": 0.0,
        "usage": usage.tolist(),
        "relative_usage": (usage * e).max(axis=0).tolist(),
        "largest_weight": usage.max(axis=1).tolist(),
        "entropy": [0.5] * len(usage),
        **more,
    }
    step = 10 * (epoch + 1)
    return {"epoch": epoch, "step": step, "mixtures": {"moe": figures}}


def page_with(observations, folder):
    lines = [json.dumps(line) + "\n" for line in observations]
    (folder / "experts.jsonl").write_text("".join(lines))
    return keras_moe.report(folder).read_text()


def alarms_of(html):
    """The lines of the section on alarms, in order."""
    section = html[html.index("<h2>Alarms") : html.index("<h2>Experts")]
    return re.findall("<p[^>]*>(.*?)</p>", section)


EVEN, COLLAPSED, NO_LAST = [[0.25] * 4], [[1.0, 0, 0, 0]], [[1 / 3, 1 / 3, 1 / 3, 0]]


def test_a_collapse_in_the_middle_is_on_it(tmp_path):
    """Observations of the epochs 1 to 6, of which the last is healthy again."""
    usages = [EVEN, COLLAPSED, NO_LAST, NO_LAST, EVEN, NO_LAST]
    seen = [observation(i, usage) for i, usage in enumerate([*usages, EVEN])]
    none, earlier, dead, dominant = alarms_of(page_with(seen, tmp_path))
    assert none == "None in the last observation."
    assert earlier.startswith("Earlier")
    assert dead.startswith("dead expert, epochs 2 to 4, 6: moe: expert 3 has less")
    assert dead.endswith("Earlier also experts 1, 2")
    assert dominant.startswith("dominant expert, epoch 2 only: moe: expert 0 has 100%")


def test_signs_of_the_last_observation_come_first(tmp_path):
    seen = [observation(i, u) for i, u in enumerate([COLLAPSED, EVEN, NO_LAST])]
    dead, earlier, dominant = alarms_of(page_with(seen, tmp_path))
    assert dead.startswith("dead expert, epochs 1, 3: moe: expert 3 ")
    assert earlier.startswith("Earlier")
    assert dominant.startswith("dominant expert, epoch 1 only")


def test_each_polarized_gate_is_on_it_once(tmp_path):
    """The weights differ between the epochs, the gates are the same two."""
    seen = [
        observation(i, [[w, 1 - w], [1 - w, w]], top_k=None, gates=("a1", "a2"))
        for i, w in enumerate([0.96, 0.97, 0.98])
    ]
    found = alarms_of(page_with(seen, tmp_path))
    assert [line.split(" gives ")[0] for line in found] == [
        f"polarized gate, epochs 1 to 3: moe: the gate of {gate}"
        for gate in ("a1", "a2")
    ]
    assert "98%" in found[0]


def test_two_trainings_in_a_file(tmp_path):
    """Of one epoch and of two: the epochs of each are counted from 1."""
    seen = [observation(0, COLLAPSED), observation(0, EVEN), observation(1, NO_LAST)]
    dead, _, dominant = alarms_of(page_with(seen, tmp_path))
    assert dead.startswith(
        "dead expert, training 1 of 2, epoch 1; training 2 of 2, epoch 2 only: moe"
    )
    assert dominant.startswith("dominant expert, training 1 of 2, epoch 1: moe")


def test_several_observations_an_epoch(tmp_path):
    seen = [observation(i // 2, u) for i, u in enumerate([EVEN, COLLAPSED, EVEN, EVEN])]
    for i, line in enumerate(seen):
        line["step"] = i + 1
    assert alarms_of(page_with(seen, tmp_path))[2].startswith(
        "dead expert, epoch 1 only: moe"
    )


@pytest.mark.parametrize(
    ("gate", "rows", "top_k", "line"),
    [
        # 20 choices an expert of 4 are 80 rows, or 40 with two choices a row.
        ("router", 80, 1, None),
        ("router", 79, 1, "79 rows; fewer than 80 do not show dead experts."),
        ("router", 40, 2, None),
        ("router", 39, 2, "39 rows; fewer than 40 do not show dead experts."),
        ("router", 19, 2, "19 rows; fewer than 20 show no sign."),
        ("router", 20, None, None),
        # Weights of gates are no counts.
        ("click", 20, 1, None),
        ("click", 20, None, None),
        ("click", 19, None, "19 rows; fewer than 20 show no sign."),
    ],
)
def test_a_sample_that_is_too_small_is_named(gate, rows, top_k, line, tmp_path):
    seen = [observation(0, EVEN, rows=rows, top_k=top_k, gates=(gate,))]
    found = alarms_of(page_with(seen, tmp_path))
    if line is None:
        assert found == ["No sign of collapse in one observation."]
    else:
        what = "No sign of collapse that the sample can show, in one observation."
        assert found == [what, f"moe: the sample has {line}"]


def cells_of(html):
    """The table of experts: its figures by column, of the first mixture."""
    table = html[html.index("<h2>Experts") :].split("</table>")[0]
    head, first = table.split("<tr>")[1:3]
    names = re.findall("<th[^>]*>(?:<span[^>]*>)?(.*?)(?:</span>)?</th>", head)
    return dict(zip(names, re.findall("<td[^>]*>(.*?)</td>", first), strict=True))


def test_figures_of_the_experts(tmp_path):
    """Each expert has its part of 0.75 or 0.25 in one gate: 1.5 times an even one."""
    usage = [[0.75, 0.25], [0.25, 0.75]]
    seen = [observation(0, usage, gates=("a", "b"), top_k=None)]
    cells = cells_of(page_with(seen, tmp_path))
    assert cells["least used expert: its largest share in a gate (1: even share)"] == (
        "1.5"
    )
    assert cells["rows"] == "1,000"
    assert not {"dropped choices", "zeros in hidden units"} & cells.keys()
    known = {"dropped": 0.125, "zero_activations": [0.25, 0.5, 0.5, 0.75]}
    cells = cells_of(page_with([observation(0, EVEN, **known)], tmp_path))
    assert cells["dropped choices"] == "0.125"
    assert cells["zeros in hidden units"] == "0.5"


@pytest.mark.parametrize("curves", [[1.0, 0.5], {"loss": 0.5}])
def test_curves_of_another_form_are_settings(curves, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"curves": curves}))
    text = Page(keras_moe.report(tmp_path).read_text()).text
    settings = text[text.index("Settings") :]
    assert "curves" in settings
    assert "0.5" in settings


def test_warnings_alone_are_no_settings(tmp_path):
    (tmp_path / "metrics.json").write_text('{"warnings": []}')
    text = Page(keras_moe.report(tmp_path).read_text()).text
    assert "Settings" not in text
    assert "Warnings" not in text


@needs_browser
def test_the_page_on_a_phone(run, tmp_path):
    """Text in pictures has 10 CSS px, and a table that is cut has a shadow."""
    address = keras_moe.report(run, tmp_path / "report.html").as_uri()
    with browser() as started:
        for scheme in ("light", "dark"):
            with page_of(started, PHONE, color_scheme=scheme) as page:
                page.goto(address)
                # The last is an SVG without a size.
                for picture in page.locator("img").all()[:-1]:
                    css = picture.bounding_box()["width"]
                    dots = picture.evaluate("image => image.naturalWidth")
                    assert _style.SMALL / 72 * _style.DPI * css / dots >= 10
                table = page.locator("section", has_text="least used").locator(".wide")
                assert table.locator("th").last.bounding_box()["height"] < 150
                page_colour = shade(page.locator("h1"), 0)
                assert abs(shade(table, -1) - page_colour) > 0.1
                assert abs(shade(table, 0) - page_colour) < 0.01
                table.evaluate("element => { element.scrollLeft = 9999 }")
                assert abs(shade(table, -1) - page_colour) < 0.01
                assert abs(shade(table, 0) - page_colour) > 0.1


def shade(element, column):
    """Return the most frequent grey, from 0 to 1, of a column of pixels."""
    pixels = plt.imread(io.BytesIO(element.screenshot()))[:, column, :3]
    greys, counts = np.unique(pixels.mean(axis=1).round(3), return_counts=True)
    return float(greys[counts.argmax()])


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


@pytest.mark.parametrize("content", ["", '{"epoch": 0'])
def test_a_run_without_an_epoch_is_named(content, tmp_path):
    (tmp_path / "experts.jsonl").write_text(content)
    with pytest.raises(ValueError, match="`run` must have an observation"):
        keras_moe.report(tmp_path)


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
        {"warnings": "all is not well"},
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
    figures = first["mixtures"]["moe"]
    for name in ("usage", "relative_usage", "load", "readable", "zero_activations"):
        figures[name] = np.array(figures[name])[..., :3].tolist()
    for name in ("output_similarity", "kernel_similarity"):
        figures[name] = np.array(figures[name])[:3, :3].tolist()
    text = "\n".join([json.dumps(first), *lines, lines[-1][:40]])
    (tmp_path / "experts.jsonl").write_text(text)
    assert "load of the experts" in keras_moe.report(tmp_path).read_text()
