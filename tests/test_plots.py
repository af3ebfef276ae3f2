import io
import itertools
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from keras_moe import plots
from keras_moe.plots import _style

# Two rows, two tasks, three experts.
GATES = np.array(
    [
        [[0.6, 0.3, 0.1], [0.0, 0.2, 0.8]],
        [[0.2, 0.7, 0.1], [0.0, 0.4, 0.6]],
    ]
)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_heatmap_shows_the_means(ax):
    plots.gate_heatmap(GATES, ["click", "buy"], ax)
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown, [[0.4, 0.5, 0.1], [0.0, 0.3, 0.7]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["click", "buy"]
    assert {text.get_text() for text in ax.texts} >= {"0.40", "0.70"}


def test_usage_shows_the_share_of_favourites(ax):
    """`click` favours expert 0 in one row and 1 in the other; `buy` always 2."""
    plots.expert_usage(GATES, ["click", "buy"], ax)
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(heights, [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])


def test_current_axes_by_default(ax):
    assert plots.gate_heatmap(GATES, ["click", "buy"]) is ax


@pytest.mark.parametrize("draw", [plots.gate_heatmap, plots.expert_usage])
@pytest.mark.parametrize("gates", [GATES[0], GATES[:, :1]])
def test_wrong_shapes_are_named(draw, gates):
    with pytest.raises(ValueError, match=r"\(\.\.\., tasks, experts\).*shape"):
        draw(gates, ["click", "buy"])


def test_who_goes_where(ax):
    """Rows of "a" have expert 0, those of "b" half of 1 and half of 2."""
    weights = np.eye(3)[[0, 0, 0, 1, 2, 1]]
    plots.who_goes_where(weights, ["a", "a", "a", "b", "b", "c"], most=2, ax=ax)
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown, [[1, 0, 0], [0, 0.5, 0.5]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (3)", "b (2)"]
    with pytest.raises(ValueError, match=r"\(rows, experts\).*5 values"):
        plots.who_goes_where(weights, list("aaabb"), ax=ax)


def test_similarity_has_its_values(ax):
    similarity = np.array([[1.0, -0.5], [-0.5, 1.0]])
    plots.expert_similarity(similarity, "kernels", ax=ax)
    assert {text.get_text() for text in ax.texts} == {"1.00", "-0.50"}
    assert ax.get_title() == "kernels"
    with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
        plots.expert_similarity(np.ones((2, 3)), ax=ax)


def seen(loads):
    return [
        {"step": 10 * i, "mixtures": {"moe": {"load": np.array(load)}}}
        for i, load in enumerate(loads)
    ]


def test_load_over_time(ax):
    plots.load_over_time(seen([[0.5, 0.5], [0.9, 0.1]]), "moe", ax)
    lines = [line for line in ax.lines if line.get_label().startswith("expert")]
    assert [line.get_ydata().tolist() for line in lines] == [[0.5, 0.9], [0.5, 0.1]]
    assert lines[0].get_xdata().tolist() == [0, 10]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    with pytest.raises(ValueError, match=r"one of \['moe'\].*'mmoe'"):
        plots.load_over_time(seen([[1.0]]), "mmoe", ax)


def test_load_of_many_experts(ax):
    plots.load_over_time(seen(np.full((3, 16), 1 / 16)), "moe", ax)
    assert legend(ax) == ["all", "half", "median"]


def test_conflict(ax):
    plots.gradient_conflict([[1.0, -0.2], [-0.2, np.nan]], ["click", "buy"], ax)
    assert {text.get_text() for text in ax.texts} == {"1.00", "-0.20"}
    # The cell without a number is explained.
    assert ax.get_xlabel() == "task\n(grey: no gradient)"
    assert to_rgb(ax.get_facecolor()) == to_rgb(_style.MISSING)
    with pytest.raises(ValueError, match=r"`cosines` must have the shape \(2, 2\)"):
        plots.gradient_conflict(np.eye(3), ["click", "buy"], ax)


def test_learning_curves(ax):
    history = {"a_loss": [2.0, 1.0], "val_a_loss": [4.0, 2.0], "b_loss": [1.0, 0.5]}
    plots.learning_curves(history, ["a", "b"], ax)
    drawn = [line.get_ydata().tolist() for line in ax.lines[:3]]
    assert drawn == [[1.0, 0.5], [2.0, 1.0], [1.0, 0.5]]
    with pytest.raises(ValueError, match=r"`history` must have.*\['c_loss'\]"):
        plots.learning_curves(history, ["c"], ax)


def test_calibration_by_hand(ax):
    """Two bins: predictions of 0.2 happen once of two, those of 0.8 always."""
    predicted = {"click": np.array([0.8, 0.2, 0.8, 0.2, 0.5])}
    labels = {"click": np.array([1.0, 0.0, 1.0, 1.0, np.nan])}
    plots.calibration(predicted, labels, num_bins=2, ax=ax)
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0.2, 0.8])
    np.testing.assert_allclose(line.get_ydata(), [0.5, 1.0])
    with pytest.raises(ValueError, match=r"one label for each.*'buy'"):
        plots.calibration({"buy": np.ones(3)}, labels, ax=ax)


def test_no_bins(ax):
    with pytest.raises(ValueError, match=r"`num_bins` must be .*num_bins=0"):
        plots.calibration({"a": np.ones(3)}, np.ones(3), num_bins=0, ax=ax)


def test_lines_and_bars_differ_in_colour_or_style():
    """Experts 0 and 7 looked the same."""
    assert len({tuple(_style.line(i).values()) for i in range(28)}) == 28
    assert len({tuple(_style.bars(i).values()) for i in range(28)}) == 28


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


EIGHT = [f"task {i}" for i in range(8)]


def history_of_eight(**more):
    """As `history.history`, but arrays."""
    return {f"{task}_loss": np.array([2.0, 1.0, 0.5]) for task in EIGHT} | more


def test_eight_tasks_look_different(ax):
    plots.learning_curves(history_of_eight(), EIGHT, ax)
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(styles) == len(ax.lines) == 8
    ax.clear()
    plots.expert_usage(np.full((4, 8, 3), 1 / 3), EIGHT, ax)
    bars = [group.patches[0] for group in ax.containers]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 8


def test_a_negative_loss_that_falls_is_drawn_falling(ax):
    """-1, -1.5, -2 was drawn as 1, 1.5, 2."""
    history = {"a_loss": [-2.0, -3.0, -4.0], "b_loss": [2.0, 1.0, -1.0]}
    plots.learning_curves(history, ["a", "b"], ax)
    drawn = [line.get_ydata().tolist() for line in ax.lines]
    assert drawn == [[-1.0, -1.5, -2.0], [1.0, 0.5, -0.5]]
    assert ax.get_ylabel() == "loss / |first training loss|"


@pytest.mark.parametrize("first", [0.0, np.nan])
def test_a_first_loss_that_divides_nothing(first, ax):
    plots.learning_curves({"loss": [first, 1.0]}, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [first, 1.0])


def test_validation_is_in_the_legend_if_it_is_drawn(ax):
    plots.learning_curves({"loss": [1.0, 0.5]}, ax=ax)
    assert legend(ax) == ["loss"]
    ax.clear()
    plots.learning_curves({"loss": [1.0, 0.5], "val_loss": [1.0, 0.7]}, ax=ax)
    assert legend(ax) == ["loss", "training", "validation"]
    training, validation = ax.lines[:2]
    assert training.get_marker() != validation.get_marker()


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_ticks_are_whole_epochs(epochs, ax):
    plots.learning_curves({"loss": np.linspace(1, 0.5, epochs)}, ax=ax)
    ticks = ax.get_xticks()
    assert len(ticks)
    assert (ticks == ticks.round()).all()


MATRICES = {
    plots.gate_heatmap: (GATES, ["click", "buy"]),
    plots.who_goes_where: (GATES[0], ["drama", "crime"]),
    plots.expert_similarity: (np.eye(3),),
    plots.gradient_conflict: (np.eye(2), ["click", "buy"]),
}


@pytest.mark.parametrize("draw", MATRICES, ids=lambda draw: draw.__name__)
def test_axes_and_colours_have_labels(draw, ax):
    draw(*MATRICES[draw], ax=ax)
    bar = ax.images[0].colorbar.ax
    assert all([ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()])
    assert "grey" not in ax.get_xlabel()


def _linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _contrast(first, second):
    """Contrast ratio of WCAG 2, from 1 to 21."""
    a, b = (_linear(c) @ [0.2126, 0.7152, 0.0722] for c in (first, second))
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


# Machado, Oliveira & Fernandes 2009, severity 1: protanopia, deuteranopia, tritanopia.
SEEN = {
    "all": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritan": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def _lab(linear):
    to_xyz = np.array(
        [
            [0.4124, 0.3576, 0.1805],
            [0.2126, 0.7152, 0.0722],
            [0.0193, 0.1192, 0.9505],
        ]
    )
    xyz = to_xyz @ np.clip(linear, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", ["white", "black"])
def test_colours_are_visible(page):
    """The seventh was black, and vanished on a dark page."""
    assert min(_contrast(colour, page) for colour in _style.COLOURS) > 2


@pytest.mark.parametrize("kind", SEEN)
def test_colours_differ_for_the_colour_blind(kind):
    """By a CIE 1976 difference of 15; about 2 is just noticeable."""
    labs = [_lab(SEEN[kind] @ _linear(colour)) for colour in _style.COLOURS]
    apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)]
    assert min(apart) > 15


@pytest.mark.parametrize("draw", [plots.gate_heatmap, plots.expert_usage])
def test_without_matplotlib(draw, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (draw, lambda *given: _style.as_png(draw, *given)):
        with pytest.raises(
            ImportError, match=r"^`keras_moe\.plots` needs matplotlib: run"
        ):
            call(GATES, ["click", "buy"])


def within(figure, box):
    inside = figure.bbox
    return min(box.x0, box.y0) >= 0 and box.x1 <= inside.x1 and box.y1 <= inside.y1


def drawn(plot, *arguments):
    """Return the axes that `as_png` makes, and the picture's pixels."""
    found = []
    content = _style.as_png(
        lambda *given, ax: found.append(plot(*given, ax=ax)), *arguments
    )
    return found[0], plt.imread(io.BytesIO(content))


LONG = seen(np.random.default_rng(0).dirichlet(np.ones(12), size=4))
WITH_MANY = {
    "curves": (plots.learning_curves, history_of_eight(), EIGHT),
    "load": (plots.load_over_time, LONG, "moe"),
    "usage": (plots.expert_usage, np.full((4, 8, 32), 1 / 32), EIGHT),
    "gates": (plots.gate_heatmap, np.full((4, 2, 32), 1 / 32), ["click", "buy"]),
    "similarity": (plots.expert_similarity, np.eye(8)),
    "conflict": (plots.gradient_conflict, np.eye(4), ["purchase_after_click"] * 4),
}


@pytest.mark.parametrize("name", WITH_MANY)
def test_pictures_of_a_page_are_readable_on_a_phone(name):
    """Text of 10 CSS px, none over another, and no legend over the data."""
    ax, pixels = drawn(*WITH_MANY[name])
    figure = ax.figure
    width, height = figure.get_size_inches()
    np.testing.assert_allclose(pixels.shape[:2], np.array([height, width]) * _style.DPI)
    # A phone of 390 px with margins of 16.
    css = {
        text: text.get_fontsize() / 72 * (390 - 32) / width
        for text in figure.findobj(Text)
        if text.get_text()
    }
    assert min(css[text] for text in css if text not in ax.texts) >= 10
    assert min((css[text] for text in ax.texts), default=9) >= 9
    names = [label for label in ax.get_xticklabels() if label.get_rotation() == 0]
    boxes = [text.get_window_extent() for text in [*names, *ax.texts]]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        box = text.get_window_extent()
        assert within(figure, box)
    if ax.get_legend() is not None:
        box = ax.get_legend().get_window_extent()
        assert not box.overlaps(ax.get_window_extent())
        assert not box.overlaps(ax.xaxis.get_tightbbox())
        assert within(figure, box)
