"""`RowwiseAdagrad` against its oracle, and what it does with other variables."""

import keras
import numpy as np
import pytest

from keras_moe.optimizers import RowwiseAdagrad
from tests.support import optimizer_oracles as oracles
from tests.support import optimizer_steps as steps
from tests.support.optimizer_steps import BETA_1, BETA_2, EPSILON, FORMS, RATE

ROWS, COLUMNS = 20, 3
EXACT = steps.EXACT
HYPER = (RATE, BETA_1, BETA_2, EPSILON)


def table(**kwargs):
    value = np.random.default_rng(5).normal(size=(ROWS, COLUMNS))
    return steps.variable(value, **kwargs)


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_equals_its_oracle(form, start):
    weight, given = table(), oracles.table_steps(ROWS, COLUMNS, 15)
    given[3].append((ROWS - 1, np.zeros(COLUMNS)))
    wanted = oracles.rowwise_adagrad(
        steps.array(weight), given, 4 * RATE, start, EPSILON
    )
    optimizer = RowwiseAdagrad(
        *HYPER, table_learning_rate_multiplier=4.0, initial_accumulator_value=start
    )
    steps.train_table(optimizer, weight, given, form)
    found = [weight, *optimizer.variables[2:]]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(steps.array(a), b, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_by_hand(form):
    """Id 1 with the gradients (1, 2) and (2, 2): g = (3, 4).

    The accumulator is (9 + 16) / 2 = 12.5. With the learning rate 1/2 and the
    multiplier 10, the row moves by 5 g / sqrt(12.5) = (4.2426, 5.6569).
    """
    weight = steps.variable(np.zeros((3, 2)))
    optimizer = RowwiseAdagrad(0.5, epsilon=0.0)
    given = [[(1, np.array([1.0, 2.0])), (1, np.array([2.0, 2.0]))]]
    steps.train_table(optimizer, weight, given, form)
    found = steps.array(weight)
    np.testing.assert_allclose(found[1], [-4.2426407, -5.6568542], rtol=1e-7)
    assert not found[[0, 2]].any()
    (accumulator,) = steps.slots(optimizer)
    np.testing.assert_allclose(accumulator, [0, 12.5, 0])


def test_a_table_has_one_slot_value_a_row_and_other_variables_those_of_adam():
    weights = [table(), steps.variable(np.zeros(4), "dense/bias"), table()]
    optimizer = RowwiseAdagrad()
    optimizer.build(weights)
    shapes = [slot.shape for slot in steps.slots(optimizer)]
    assert shapes == [(ROWS,), (4,), (4,), (ROWS,)]


def test_other_variables_get_adam():
    weight, bias = table(), steps.variable(np.zeros(4), "dense/bias")
    given = [np.array([1.0, 0.0, -2.0, 0.5]), np.zeros(4), np.ones(4)]
    row = steps.gradient([(0, np.ones(COLUMNS))], (ROWS, COLUMNS))
    pairs = [[row, keras.ops.convert_to_tensor(g)] for g in given]
    steps.train(RowwiseAdagrad(*HYPER), [weight, bias], pairs)
    wanted, _, _ = oracles.adam(np.zeros(4), given, *HYPER)
    np.testing.assert_allclose(steps.array(bias), wanted, **EXACT)


@steps.on_tensorflow
def test_sparse_gradients_of_other_variables_get_lazy_adam():
    given = oracles.table_steps(ROWS, COLUMNS, 5)
    weight = table(path="layer/rows")
    wanted, _, _ = oracles.lazy_adam(steps.array(weight), given, *HYPER)
    steps.train_table(RowwiseAdagrad(*HYPER), weight, given, "sparse")
    np.testing.assert_allclose(steps.array(weight), wanted, **EXACT)


@pytest.mark.parametrize("shape", [(6,), (6, 2, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_tables_of_any_rank(form, shape):
    rng = np.random.default_rng(0)
    given = [[(i, rng.normal(size=shape[1:])) for i in (1, 4, 1)] for _ in range(4)]
    value = rng.normal(size=shape)
    wanted, _ = oracles.rowwise_adagrad(value, given, 10 * RATE, 0.0, EPSILON)
    weight = steps.variable(value)
    steps.train_table(RowwiseAdagrad(*HYPER), weight, given, form)
    np.testing.assert_allclose(steps.array(weight), wanted, **EXACT)


@pytest.mark.parametrize(
    ("name", "value"),
    [("table_learning_rate_multiplier", 0.0), ("initial_accumulator_value", -1.0)],
)
def test_wrong_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        RowwiseAdagrad(**{name: value})


def test_has_its_own_config():
    optimizer = RowwiseAdagrad(
        0.25, table_learning_rate_multiplier=3.0, initial_accumulator_value=0.5
    )
    twin = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(twin) is RowwiseAdagrad
    assert twin.get_config() == optimizer.get_config()
    assert twin.table_learning_rate_multiplier == 3.0
    assert twin.initial_accumulator_value == 0.5
