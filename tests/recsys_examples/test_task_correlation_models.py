"""Models of equal size, and the training loop."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from recsys_examples.errors import InputError
from recsys_examples.task_correlation.data import make_pair
from recsys_examples.task_correlation.models import (
    build_model,
    equal_widths,
    parameters,
)
from recsys_examples.task_correlation.settings import BOTTOM, MMOE, MODELS, OMOE, Recipe
from recsys_examples.task_correlation.training import Trainer

RECIPE = Recipe(dimension=6, sines=0, train_rows=64, test_rows=40)
BATCH = 16


@pytest.fixture(scope="module")
def widths():
    return equal_widths(100)


class TestSize:
    def test_the_paper_s_mmoe(self, widths):
        assert widths[MMOE] == 16
        # 8 experts with biases, 2 gates without biases, 2 towers of 8 units and 1.
        by_hand = 8 * 101 * 16 + 2 * 100 * 8 + 2 * (16 * 8 + 8 + 8 + 1)
        assert parameters(MMOE, 16, 100) == by_hand == 14_818

    def test_a_shared_bottom_by_hand(self):
        assert parameters(BOTTOM, 113, 100) == 101 * 113 + 2 * (113 * 8 + 8 + 8 + 1)

    def test_equal(self, widths):
        counts = {model: parameters(model, widths[model], 100) for model in MODELS}
        for model, count in counts.items():
            assert count == pytest.approx(counts[MMOE], rel=0.01), model

    @pytest.mark.parametrize("model", MODELS)
    def test_width_is_the_nearest(self, widths, model):
        def distance(width):
            return abs(parameters(model, width, 100) - 14_818)

        width = widths[model]
        assert distance(width) <= min(distance(width - 1), distance(width + 1))

    def test_all_counted_weights_are_trainable(self, widths):
        for model in MODELS:
            built = build_model(model, widths[model], 100)
            assert not built.non_trainable_variables


class TestModel:
    @pytest.mark.parametrize("model", MODELS)
    def test_one_column_per_task(self, model):
        built = build_model(model, 4, 6)
        inputs = np.random.default_rng(0).normal(size=(5, 6))
        before = built.predict(inputs, verbose=0)
        assert before.shape == (5, 2)
        bias = built.get_layer("second_tower").output_unit.bias
        bias.assign(bias + 1.0)
        moved = built.predict(inputs, verbose=0) - before
        np.testing.assert_allclose(moved, [[0.0, 1.0]] * 5, atol=1e-6)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(MMOE, 3, 6, BATCH)


@pytest.fixture(scope="module")
def pair():
    return make_pair(0.5, RECIPE, 0)


def fitted(pair, epochs, learning_rate, seed):
    """The test MSE after training by `keras.Model.fit`."""
    keras.utils.set_random_seed(seed)
    model = build_model(MMOE, 3, 6)
    model.compile(keras.optimizers.Adam(learning_rate), "mse")
    model.fit(
        pair.train.inputs,
        pair.train.labels,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    predictions = model.predict(pair.test.inputs, verbose=0)
    return np.mean((predictions - pair.test.labels) ** 2, axis=0)


class TestTrainer:
    @pytest.mark.parametrize(
        ("steps", "epochs"), [(4, 1), (12, 3)], ids=["one pass", "three passes"]
    )
    def test_equals_fit(self, trainer, pair, steps, epochs):
        losses = trainer.run(pair, steps, 0.01, seed=5)
        np.testing.assert_allclose(losses, fitted(pair, epochs, 0.01, 5), rtol=1e-4)

    def test_incomplete_last_batch_is_dropped(self, trainer, pair):
        longer = make_pair(0.5, replace(RECIPE, train_rows=70), 0)
        shorter = replace(
            longer,
            train=type(pair.train)(longer.train.inputs[:64], longer.train.labels[:64]),
        )
        assert trainer.run(longer, 9, 0.01, 0) == trainer.run(shorter, 9, 0.01, 0)

    def test_runs_are_independent(self, trainer, pair):
        first = trainer.run(pair, 8, 0.01, seed=0)
        trainer.run(make_pair(0.5, RECIPE, 1), 8, 0.1, seed=1)
        assert trainer.run(pair, 8, 0.01, seed=0) == first
        assert trainer.run(pair, 8, 0.01, seed=1) != first
        assert trainer.run(pair, 8, 0.02, seed=0) != first

    def test_it_learns(self, trainer):
        # Linear labels of variance 1, with a noise variance of 0.01.
        pair = make_pair(0.5, replace(RECIPE, train_rows=4096), 0)
        before = trainer.run(pair, 0, 0.01, 0)
        after = trainer.run(pair, 1500, 0.01, 0)
        assert max(after) < 0.1 < 0.5 < min(before)
        assert all(isinstance(loss, float) for loss in after)

    def test_divergence_raises(self, trainer, pair):
        huge = replace(
            pair, test=replace(pair.test, labels=pair.test.labels + np.float32(1e30))
        )
        with pytest.raises(InputError, match="MMoE diverged: the loss is not finite"):
            trainer.run(huge, 1, 0.01, 0)


def test_omoe_is_wider_for_its_missing_gate(widths):
    # The parameters of one gate, 100 x 8, equal those of one unit more per expert.
    assert widths[OMOE] == 17
