"""`FusedAdagrad` against its oracle and Keras' Adagrad."""

import keras
import numpy as np
import pytest

from keras_moe.optimizers import FusedAdagrad
from tests.support import optimizer_oracles as oracles
from tests.support import optimizer_steps as steps
from tests.support.optimizer_steps import FORMS, RATE

ROWS, COLUMNS = 20, 3
EXACT = steps.EXACT


def table(value=None, dtype="float64"):
    if value is None:
        value = np.random.default_rng(5).normal(size=(ROWS, COLUMNS))
    return steps.variable(value, dtype=dtype)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("form", FORMS)
def test_equals_its_oracle(form, epsilon):
    weight, given = table(), oracles.table_steps(ROWS, COLUMNS, 15)
    value, total = oracles.adagrad(steps.array(weight), given, RATE, 0.125, epsilon)
    optimizer = FusedAdagrad(RATE, 0.125, epsilon)
    steps.train_table(optimizer, weight, given, form)
    np.testing.assert_allclose(steps.array(weight), value, **EXACT)
    (accumulator,) = steps.slots(optimizer)
    np.testing.assert_allclose(accumulator, total + epsilon, rtol=1e-7)


@steps.on_tensorflow
@pytest.mark.parametrize("form", ["sparse", "sparse graph", "sparse xla"])
def test_repeated_ids_are_summed_first(form):
    """Gradient 1 three times adds 9, not 3."""
    weight = table(np.zeros((2, 1)))
    optimizer = FusedAdagrad(1.0, 0.0, 0.0)
    steps.train_table(optimizer, weight, [[(1, [1.0])] * 3], form)
    np.testing.assert_allclose(steps.slots(optimizer)[0].ravel(), [0, 9])
    np.testing.assert_allclose(steps.array(weight).ravel(), [0, -1])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weight_decay": 0.1},
        {"global_clipnorm": 0.5},
        {"use_ema": True, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 4.0},
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_keras_with_dense_gradients(form, arguments):
    given = oracles.table_steps(ROWS, COLUMNS, 12)
    weight, twin = table(), table()
    steps.train_table(FusedAdagrad(0.125, **arguments), weight, given, form)
    steps.train_table(
        keras.optimizers.Adagrad(0.125, **arguments), twin, given, "dense"
    )
    np.testing.assert_allclose(
        steps.array(weight), steps.array(twin), rtol=1e-7, atol=1e-8
    )


def test_has_its_own_config():
    optimizer = FusedAdagrad(0.25, initial_accumulator_value=0.5, clipnorm=1.0)
    twin = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(twin) is FusedAdagrad
    assert twin.get_config() == optimizer.get_config()
