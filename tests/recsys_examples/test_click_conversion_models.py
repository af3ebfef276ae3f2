"""The models: outputs, equal sizes, and every loss weighting."""

import numpy as np
import pytest

from recsys_examples.click_conversion import weightings
from recsys_examples.click_conversion.models import (
    Columns,
    Shape,
    build_model,
    equal_shape,
)
from recsys_examples.click_conversion.problems import Chain, Goal, Separate
from recsys_examples.click_conversion.settings import (
    BOTTOM,
    DR,
    MMOE,
    MODELS,
    NAIVE,
    PLE,
    SINGLE,
)
from recsys_examples.errors import InputError
from recsys_examples.widths import nearest_width

COLUMNS = Columns(("a", "b"), (("plan", 20), ("site", 3)))
AMOUNTS = Separate(
    (Goal("spend"), Goal("amount", "regression", "spend"), Goal("dollars", "ziln"))
)


def rows(n=5):
    return {"numbers": np.ones((n, 2)), "codes": np.ones((n, 2), np.int32)}


@pytest.mark.parametrize("model", MODELS)
def test_a_chain(model):
    built = build_model(Chain(), model, COLUMNS, Shape(4, (3,)))
    found = built(rows())
    imputed = {"imputed_conversion"} if model == DR else set()
    assert set(found) == {"click", "conversion", "click_and_conversion"} | imputed
    product = np.multiply(found["click"], found["conversion"])
    # AITM's joint probability may exceed that of the click; the rate is 1 there.
    joint = np.minimum(found["click_and_conversion"], found["click"])
    np.testing.assert_allclose(joint, product, rtol=1e-5)


@pytest.mark.parametrize("model", NAIVE)
def test_separate_tasks(model):
    found = build_model(AMOUNTS, model, COLUMNS, Shape(4))(rows())
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {"spend": (5, 1), "amount": (5, 1), "dollars": (5, 3)}


def test_single_tasks_share_nothing():
    built = build_model(AMOUNTS, SINGLE, COLUMNS, Shape(4))
    tables = [layer.name for layer in built.layers if layer.name.endswith("_table")]
    assert sorted(tables) == sorted(
        f"{task}_{column}_table"
        for task in ("spend", "amount", "dollars")
        for column in ("plan", "site")
    )


def test_dimensions_of_tables():
    """The root of the vocabulary, at most 8."""
    columns = Columns((), (("a", 3), ("b", 20), ("c", 1000)))
    built = build_model(Chain(), BOTTOM, columns, Shape(4))
    sizes = [built.get_layer(f"{name}_table").output_dim for name in "abc"]
    assert sizes == [2, 5, 8]


@pytest.mark.parametrize("model", MODELS)
def test_equal_sizes(model):
    bottom = Shape(32, (8,))
    shape, parameters = equal_shape(Chain(), model, COLUMNS, bottom)
    built = build_model(Chain(), model, COLUMNS, shape)
    assert built.count_params() == parameters
    _, wanted = equal_shape(Chain(), BOTTOM, COLUMNS, bottom)
    assert abs(parameters - wanted) < 0.1 * wanted
    assert shape.towers == bottom.towers


def test_the_bottom_keeps_its_width():
    assert equal_shape(Chain(), BOTTOM, COLUMNS, Shape(7))[0] == Shape(7)


def test_nearest_width():
    # 3, 8, 15, 24: 24 is nearer to 20 than 15 is.
    assert nearest_width(lambda width: width**2 + 2 * width, 20) == 4
    assert nearest_width(lambda width: width**2 + 2 * width, 19) == 3


class TestLossWeightings:
    @pytest.mark.parametrize("name", weightings.names())
    @pytest.mark.parametrize("model", [MMOE, PLE])
    def test_every_name(self, name, model):
        built = build_model(Chain(), model, COLUMNS, Shape(4), name)
        built.compile("adam", run_eagerly=True)
        labels = {
            "click": np.float32([0, 1, 1, 0, 1]),
            "conversion": np.float32([np.nan, 1, 0, np.nan, 1]),
        }
        before = built.get_weights()
        history = built.fit(rows(), labels, verbose=0)
        assert np.isfinite(history.history["click_loss"]).all()
        assert any(
            (a != b).any() for a, b in zip(before, built.get_weights(), strict=True)
        )
        assert all(
            np.isfinite(value).all()
            for value in built.predict(rows(), verbose=0).values()
        )

    def test_names(self):
        assert {"uncertainty", "famo", "pcgrad", "upgrad", "dwa", "fixed"} <= set(
            weightings.names()
        )
        assert weightings.make(None, 3) is None

    def test_unknown(self):
        with pytest.raises(InputError) as caught:
            weightings.make("sum", 2)
        message = str(caught.value)
        assert message.startswith("--loss-weighting: must be one of aligned_mtl, ")
        assert message.endswith("; got 'sum'")
