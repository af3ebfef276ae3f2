import matplotlib.pyplot as plt
import numpy as np
import pytest

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
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["all", "half", "median"]


def test_conflict(ax):
    plots.gradient_conflict([[1.0, -0.2], [-0.2, np.nan]], ["click", "buy"], ax)
    assert {text.get_text() for text in ax.texts} == {"1.00", "-0.20"}
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


def test_lines_differ_in_colour_or_style():
    """Experts 0 and 7 looked the same."""
    styles = {tuple(_style.line(i).values()) for i in range(28)}
    assert len(styles) == 28
