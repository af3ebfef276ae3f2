"""`LazyAdam` against its oracle, and against Adam where every row has a gradient."""

import keras
import numpy as np
import pytest

from keras_moe.optimizers import FusedAdam, LazyAdam
from tests.support import optimizer_oracles as oracles
from tests.support import optimizer_steps as steps
from tests.support.optimizer_steps import BETA_1, BETA_2, EPSILON, FORMS, RATE

ROWS, COLUMNS = 20, 3
EXACT = steps.EXACT
HYPER = (RATE, BETA_1, BETA_2, EPSILON)


def table(rows=ROWS, columns=COLUMNS, **kwargs):
    rng = np.random.default_rng(5)
    return steps.variable(rng.normal(size=(rows, columns)), **kwargs)


@pytest.mark.parametrize("form", FORMS)
def test_equals_its_oracle(form):
    weight, given = table(), oracles.table_steps(ROWS, COLUMNS, 15)
    given[3].append((ROWS - 1, np.zeros(COLUMNS)))
    wanted = oracles.lazy_adam(steps.array(weight), given, *HYPER)
    optimizer = LazyAdam(*HYPER)
    steps.train_table(optimizer, weight, given, form)
    found = [weight, *optimizer.variables[2:]]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(steps.array(a), b, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_the_multiplier_is_that_of_tables_alone(form):
    weight, twin = table(), table()
    bias, other = (steps.variable(np.ones(2), "dense/bias") for _ in range(2))
    for rate, multiplier, weights in (
        (RATE, 4.0, [weight, bias]),
        (4 * RATE, 1.0, [twin, other]),
    ):
        given = oracles.table_steps(ROWS, COLUMNS, 5)
        b = keras.ops.convert_to_tensor(np.array([3.0, -4.0]))
        pairs = [[steps.gradient(s, (ROWS, COLUMNS), form), b] for s in given]
        optimizer = LazyAdam(
            rate, *HYPER[1:], table_learning_rate_multiplier=multiplier
        )
        steps.train(optimizer, weights, pairs, form)
    np.testing.assert_allclose(steps.array(weight), steps.array(twin), **EXACT)
    moved = [1 - steps.array(b) for b in (bias, other)]
    np.testing.assert_allclose(4 * moved[0], moved[1], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_is_adam_if_every_row_has_a_gradient(form):
    rng = np.random.default_rng(0)
    given = [
        [
            (int(i), rng.normal(size=COLUMNS))
            for i in rng.permutation([*range(ROWS)] * 2)
        ]
        for _ in range(10)
    ]
    weight, twin = table(), table()
    steps.train_table(LazyAdam(*HYPER), weight, given, form)
    steps.train_table(keras.optimizers.Adam(*HYPER), twin, given, "dense")
    np.testing.assert_allclose(steps.array(weight), steps.array(twin), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_gradient_stay_bit_for_bit(form):
    weight = table()
    before = steps.array(weight).copy()
    # Row 2 has gradients that cancel, row 3 one of zeros.
    one = np.ones(COLUMNS)
    given = [[(1, one), (2, one), (2, -one), (3, 0 * one), (1, one)]] * 3
    optimizer = LazyAdam(*HYPER)
    steps.train_table(optimizer, weight, given, form)
    others = np.arange(ROWS) != 1
    np.testing.assert_array_equal(steps.array(weight)[others], before[others])
    assert not np.any(steps.array(weight)[1] == before[1])
    for slot in steps.slots(optimizer):
        assert not slot[others].any()


def test_one_step_by_hand():
    """Id 1 twice with gradient 1: g = 2.

    m = 0.125 * 2 = 0.25, v = 2^-7 * 4 = 2^-5. In step 1, sqrt(2^-7) / 0.125 * 0.25 /
    sqrt(2^-5) = 1: the row moves by the learning rate.
    """
    form = FORMS[0]
    weight = steps.variable(np.zeros((3, 1)))
    optimizer = LazyAdam(RATE, BETA_1, BETA_2, 0.0)
    steps.train_table(optimizer, weight, [[(1, [1.0]), (1, [1.0])]], form)
    np.testing.assert_allclose(steps.array(weight).ravel(), [0, -RATE, 0], rtol=1e-12)
    m, v = steps.slots(optimizer)
    np.testing.assert_allclose(m.ravel(), [0, 0.25, 0])
    np.testing.assert_allclose(v.ravel(), [0, 2.0**-5, 0])


def test_other_variables_get_adam():
    weight, bias = table(), steps.variable(np.zeros(4), "dense/bias")
    given = [np.array([1.0, 0.0, -2.0, 0.5]), np.zeros(4), np.ones(4)]
    row = steps.gradient([(0, np.ones(COLUMNS))], (ROWS, COLUMNS))
    pairs = [[row, keras.ops.convert_to_tensor(g)] for g in given]
    steps.train(LazyAdam(*HYPER), [weight, bias], pairs)
    wanted, _, _ = oracles.adam(np.zeros(4), given, *HYPER)
    np.testing.assert_allclose(steps.array(bias), wanted, **EXACT)


@pytest.mark.parametrize(
    "clip",
    [{"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.25}],
    ids=lambda clip: next(iter(clip)),
)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_clipped_by_the_norm_of_the_dense_gradient(form, clip):
    """Rows in the batch in every step, twice each, so that dense Adam is the same."""
    rng = np.random.default_rng(0)
    given = [[(i % 4, rng.normal(size=COLUMNS)) for i in range(8)] for _ in range(5)]
    weight, twin = table(4), table(4)
    bias, other = (steps.variable(np.ones(2), "dense/bias") for _ in range(2))
    b = keras.ops.convert_to_tensor(np.array([3.0, -4.0]))
    for optimizer, weights, how in (
        (LazyAdam(*HYPER, **clip), [weight, bias], form),
        (keras.optimizers.Adam(*HYPER, **clip), [twin, other], "dense"),
    ):
        pairs = [[steps.gradient(s, (4, COLUMNS), how), b] for s in given]
        steps.train(optimizer, weights, pairs, how)
    np.testing.assert_allclose(steps.array(weight), steps.array(twin), **EXACT)
    np.testing.assert_allclose(steps.array(bias), steps.array(other), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_scale_factor_divides_gradients(form):
    given = oracles.table_steps(ROWS, COLUMNS, 4)
    scaled = [[(row, 8 * g) for row, g in step] for step in given]
    weight, twin = table(), table()
    steps.train_table(LazyAdam(*HYPER, loss_scale_factor=8.0), weight, scaled, form)
    steps.train_table(LazyAdam(*HYPER), twin, given, form)
    np.testing.assert_allclose(steps.array(weight), steps.array(twin), **EXACT)


@pytest.mark.parametrize("shape", [(6,), (6, 2, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_tables_of_any_rank(form, shape):
    rng = np.random.default_rng(0)
    given = [[(i, rng.normal(size=shape[1:])) for i in (1, 4, 1)] for _ in range(4)]
    value = rng.normal(size=shape)
    wanted, _, _ = oracles.lazy_adam(value, given, *HYPER)
    weight = steps.variable(value)
    steps.train_table(LazyAdam(*HYPER), weight, given, form)
    np.testing.assert_allclose(steps.array(weight), wanted, **EXACT)


@pytest.mark.parametrize(
    ("tables", "path", "lazy"),
    [
        ({}, "embedding_1/embeddings", True),
        ({}, "layer/table", False),
        ({"tables": "table$"}, "layer/table", True),
        ({"tables": "table$"}, "layer/embeddings", False),
    ],
)
@pytest.mark.filterwarnings("ignore:LazyAdam. `tables` finds none:UserWarning")
def test_tables_are_found_by_their_path(tables, path, lazy):
    """With dense gradients, only a path says that a variable is a table.

    Row 0 has a gradient in the first of two steps. The rate is 1/2: Adam moves the row
    by 1/2 in the first step, and again in the second.
    """
    weight = steps.variable(np.zeros((3, 2)), path)
    step = [[(0, np.ones(2))], [(1, np.ones(2))]]
    steps.train_table(LazyAdam(0.5, **tables), weight, step, "dense")
    assert lazy == bool(np.allclose(steps.array(weight)[0], -0.5, rtol=1e-5))


@steps.on_tensorflow
def test_a_sparse_gradient_makes_any_variable_a_table():
    given = oracles.table_steps(ROWS, COLUMNS, 5)
    weight = table(path="layer/rows")
    wanted, _, _ = oracles.lazy_adam(steps.array(weight), given, *HYPER)
    steps.train_table(LazyAdam(*HYPER), weight, given, "sparse")
    np.testing.assert_allclose(steps.array(weight), wanted, **EXACT)


def test_is_a_fused_adam_with_its_own_config():
    optimizer = LazyAdam(0.25, tables="table$", clipnorm=1.0)
    assert isinstance(optimizer, FusedAdam)
    twin = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(twin) is LazyAdam
    assert twin.get_config() == optimizer.get_config()
    assert twin.tables == "table$"
