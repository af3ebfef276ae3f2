"""A run: deterministic given the seed, better than chance, correctly evaluated."""

import numpy as np
import pytest

from recsys_examples.census_income import training
from recsys_examples.census_income.data import load_census
from recsys_examples.census_income.features import GROUPS, Rows, make_splits
from recsys_examples.census_income.models import (
    MODELS,
    SHARED_BOTTOM,
    SINGLE_TASK,
    Settings,
)
from tests.support import census_files

TASKS = GROUPS["income"].tasks
SMALL = Settings(
    embedding=2, units=8, tower=0, epochs=3, batch_size=64, learning_rate=0.02
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = census_files.write_cut(
        tmp_path_factory.mktemp("census"),
        census_files.make_rows(600, 1),
        census_files.make_rows(400, 2),
    )
    return make_splits(load_census(folder))


@pytest.fixture(scope="module")
def outcome(splits):
    return training.run(SHARED_BOTTOM, SMALL, TASKS, splits, seed=1)


class TestRun:
    def test_it_learns(self, outcome):
        assert list(outcome.test) == list(TASKS)
        assert outcome.test["income"] > 0.65
        assert outcome.test["never_married"] > 0.7
        assert outcome.parameters > 0
        assert outcome.seconds > 0

    def test_deterministic_given_the_seed(self, splits, outcome):
        again = training.run(SHARED_BOTTOM, SMALL, TASKS, splits, seed=1)
        assert again.validation == outcome.validation
        assert again.test == outcome.test
        other = training.run(SHARED_BOTTOM, SMALL, TASKS, splits, seed=2)
        assert other.test != outcome.test

    def test_tasks_apart(self, splits):
        both = training.run(SINGLE_TASK, SMALL, TASKS, splits, seed=1)
        assert list(both.test) == list(TASKS)
        main = training.run(SINGLE_TASK, SMALL, TASKS[:1], splits, seed=1)
        assert list(main.test) == ["income"]
        assert main.parameters < both.parameters

    @pytest.mark.parametrize("model", [m for m in MODELS if m != SHARED_BOTTOM])
    def test_every_model_trains(self, model, splits):
        settings = Settings(
            **{**vars(SMALL), "epochs": 1, "structure": MODELS[model].structures[-1]}
        )
        outcome = training.run(model, settings, TASKS, splits, seed=0)
        for values in (outcome.validation, outcome.test):
            assert all(0 < values[task] < 1 for task in TASKS)


def test_the_best_epoch_is_kept(splits, monkeypatch):
    """The second of three epochs is the best: its weights are evaluated."""
    validation_aucs = iter([0.6, 0.9, 0.7])
    weights = []
    measured = training.aucs

    def aucs(model, rows):
        if rows is splits.validation:
            weights.append([np.array(w) for w in model.get_weights()])
            return {"income": next(validation_aucs), "never_married": 0.5}
        for now, then in zip(model.get_weights(), weights[1], strict=True):
            np.testing.assert_array_equal(now, then)
        return measured(model, rows)

    monkeypatch.setattr(training, "aucs", aucs)
    outcome = training.run(SHARED_BOTTOM, SMALL, TASKS, splits, seed=0)
    assert outcome.validation == {"income": 0.9, "never_married": 0.5}
    assert outcome.epoch == {"income": 2, "never_married": 2}
    assert len(weights) == 3


class FixedScores:
    def __init__(self, scores):
        self._scores = scores

    def predict(self, inputs, **_):
        return self._scores


def test_auc_by_hand():
    """Of the pairs of a positive and a negative, 3 of 4 are in order; ties are 1/2."""
    labels = np.array([1, 1, 0, 0], np.float32)
    rows = Rows(np.zeros((4, 1)), np.zeros((4, 1)), {"a": labels, "b": labels})
    scores = {
        "a": np.array([[4.0], [2.0], [3.0], [1.0]]),
        "b": np.array([[2.0], [2.0], [2.0], [1.0]]),
    }
    assert training.aucs(FixedScores(scores), rows) == {"a": 0.75, "b": 0.75}


def test_auc_of_a_diverged_model_is_one_half():
    labels = np.array([1, 0, 0], np.float32)
    rows = Rows(np.zeros((3, 1)), np.zeros((3, 1)), {"a": labels})
    scores = {"a": np.array([[1.0], [np.nan], [0.0]])}
    assert training.aucs(FixedScores(scores), rows) == {"a": 0.5}


def test_weights_of_the_losses(splits):
    """An auxiliary task of weight 0 does not move the body."""
    import keras

    built = training.build_models(
        SHARED_BOTTOM,
        SMALL,
        TASKS,
        splits.table_rows,
        splits.train.codes.shape[1],
        splits.train.numbers.shape[1],
    )
    settings = Settings(**{**vars(SMALL), "auxiliary_weight": 0.0, "epochs": 1})
    keras.utils.set_random_seed(0)
    (model,) = built
    tower = model.get_layer("never_married_tower").get_weights()
    main = model.get_layer("income_tower").get_weights()
    training._fit(model, settings, TASKS, splits)
    for now, then in zip(
        model.get_layer("never_married_tower").get_weights(), tower, strict=True
    ):
        np.testing.assert_array_equal(now, then)
    assert not np.array_equal(model.get_layer("income_tower").get_weights()[0], main[0])
