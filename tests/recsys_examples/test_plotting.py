"""The examples' own figures have the colours and line styles of `keras_moe.plots`."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from keras_moe.plots import _style
from recsys_examples.click_conversion import pictures as click_conversion
from recsys_examples.click_conversion.regimes import SCARCITY, Cell, Gain
from recsys_examples.click_conversion.settings import MIXTURES
from recsys_examples.plotting import REFERENCE, marked
from recsys_examples.task_correlation import pictures as task_correlation
from recsys_examples.two_stage import pictures as two_stage
from recsys_examples.two_stage import scale_report
from recsys_examples.two_stage.scale import FULL, RANKER_OF_ALL, SEARCHED, TWO_STAGES

OUTCOME = SimpleNamespace(
    settings=SimpleNamespace(candidates=50),
    funnel={10: 0.1, 100: 0.4, 1000: 0.9},
    fusion=SimpleNamespace(diversity=0.5),
    chosen={
        "validation_diversity": {
            "0.0": {"diversity@10": 0.5, "ndcg@10": 0.11},
            "0.5": {"diversity@10": 0.7, "ndcg@10": 0.10},
        }
    },
)
GAINS = [
    Gain(Cell(SCARCITY, line, level, None), model, gain, gain - 0.01, gain + 0.01, 0.7)
    for model, gain in zip(MIXTURES, (0.01, 0.02), strict=True)
    for line in ("tasks agree", "tasks conflict")
    for level in (0.1, 1.0)
]
LOSSES = {
    model: {p: np.random.default_rng(i).normal(1, 0.1, 9) for p in (0.0, 0.5, 1.0)}
    for i, model in enumerate(("SharedBottom", "OMoE", "MMoE"))
}
SLOPES = {TWO_STAGES: 0.1, SEARCHED: 0.05, FULL: 0.8, RANKER_OF_ALL: 2.0}
LATENCY = {
    size: {
        1: {
            "models": {
                name: {"one_ms": 5 + slope * size / 50, "batch_ms": 9 + slope * size}
                for name, slope in SLOPES.items()
            }
        }
    }
    for size in (100, 1000, 10_000)
}
DRAWN = {
    "two_stage, funnel": lambda _: two_stage._funnel(OUTCOME),
    "two_stage, diversity": lambda _: two_stage._diversity(OUTCOME),
    "two_stage, catalogue": lambda path: scale_report.draw(path, LATENCY),
    "click_conversion": lambda path: click_conversion.draw(path, GAINS),
    "task_correlation": lambda path: task_correlation.draw(path, LOSSES),
}


@pytest.fixture(params=DRAWN)
def figure(request, tmp_path, monkeypatch):
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda *_: None)
    DRAWN[request.param](tmp_path / "picture.png")
    yield plt.gcf()
    close("all")


def test_colours_are_those_of_the_library(figure):
    lines = [line for ax in figure.axes for line in ax.lines]
    colours = {to_hex(line.get_color()).upper() for line in lines}
    allowed = {*_style.COLOURS, to_hex(REFERENCE["color"]).upper()}
    assert len(lines) > 0
    assert colours <= allowed, colours


def test_lines_of_a_legend_differ_without_colours(figure):
    for ax in figure.axes:
        if ax.get_legend() is None:
            continue
        looks = [(h.get_linestyle(), h.get_marker()) for h in _lines(ax)]
        assert len(looks) == len({*looks}) > 1


def _lines(ax):
    handles, _ = ax.get_legend_handles_labels()
    # An error bar is a container, whose first part is the line.
    return [h if hasattr(h, "get_marker") else h[0] for h in handles]


def test_marked_lines_differ():
    assert len({tuple(marked(i).values()) for i in range(28)}) == 28
