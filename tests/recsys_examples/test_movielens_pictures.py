"""The plots of a run: in the style of `keras_moe.plots`, readable on a phone."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from keras_moe import plots
from recsys_examples.movielens import pictures
from recsys_examples.movielens.model import TASKS
from recsys_examples.movielens.profiles import Lifts, Profile

EPOCHS = 4
RNG = np.random.default_rng(0)
CURVES = {
    f"{prefix}{name}": list(np.linspace(2.0, 1.0 + i / 10, EPOCHS))
    for prefix in ("", "val_")
    for i, name in enumerate(["loss", *(f"{task}_loss" for task in TASKS)])
}
CURVES["val_ndcg@10"] = [0.05, 0.08, 0.1, 0.09]
GATES = RNG.dirichlet(np.ones(4), size=(1234, len(TASKS)))
WATCHED = RNG.random(400) < 0.5
ROWS = SimpleNamespace(watched=WATCHED, ratings=RNG.integers(1, 6, 400) * WATCHED)
PREDICTIONS = {task: RNG.random(400) for task in ("watch", "like")}
# As many columns as the data has genres, decades and groups.
LIFTS = [
    Lifts(tuple(f"{name} {i}" for i in range(c)), 1 + 0.2 * RNG.normal(size=(4, c)))
    for name, c in (("Documentary", 17), ("1990s", 8), ("many ratings", 6))
]


DRAW = {
    "learning_curves": lambda: pictures._learning_curves(CURVES),
    "calibration": lambda: pictures._calibration(ROWS, PREDICTIONS),
    "gate_weights": lambda: pictures._of_users(plots.gate_heatmap, GATES),
    "expert_usage": lambda: pictures._of_users(plots.expert_usage, GATES),
    "expert_lifts": lambda: pictures._lifts(Profile(TASKS, GATES.mean(axis=0), *LIFTS)),
}


@pytest.fixture(scope="module")
def figures():
    yield {name: draw() for name, draw in DRAW.items()}
    plt.close("all")


def test_curves_are_those_of_the_library(figures):
    losses, quality = figures["learning_curves"].axes
    figure, ax = plt.subplots()
    plots.learning_curves(CURVES, TASKS, ax)
    for drawn, expected in zip(losses.lines, ax.lines, strict=True):
        assert drawn.get_color() == expected.get_color()
        np.testing.assert_array_equal(drawn.get_ydata(), expected.get_ydata())
    assert list(quality.lines[0].get_ydata()) == CURVES["val_ndcg@10"]
    plt.close(figure)


def test_likes_are_of_watched_movies(figures):
    watch, like = figures["calibration"].axes[0].lines[:2]
    assert (watch.get_label(), like.get_label()) == ("watch", "like")
    found = PREDICTIONS["like"][WATCHED]
    liked = ROWS.ratings[WATCHED] >= pictures.LIKED
    order = np.argsort(found)
    bins = np.array_split(order, 10)
    np.testing.assert_allclose(like.get_xdata(), [found[b].mean() for b in bins])
    np.testing.assert_allclose(like.get_ydata(), [liked[b].mean() for b in bins])


@pytest.mark.parametrize("name", ["gate_weights", "expert_usage"])
def test_gates_of_all_users_are_called_so(name, figures):
    """The report of a run also has those of a sample."""
    assert figures[name].axes[0].get_title().endswith(", all 1,234 users")


@pytest.mark.parametrize("name", DRAW)
def test_text_is_readable_on_a_phone(name, figures):
    width = figures[name].get_size_inches()[0]
    css = [
        text.get_fontsize() / 72 * (390 - 32) / width
        for text in figures[name].findobj(Text)
        if text.get_text()
    ]
    assert min(css) >= 10
