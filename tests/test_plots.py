import matplotlib.pyplot as plt
import numpy as np
import pytest

from keras_moe import plots

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
