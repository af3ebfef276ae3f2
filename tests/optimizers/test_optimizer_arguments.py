"""What the optimizers of tables refuse. For replicas, see `test_replicas.py`."""

import keras
import numpy as np
import pytest

from keras_moe.optimizers import LazyAdam, RowwiseAdagrad

for_tables = pytest.mark.parametrize("kind", [LazyAdam, RowwiseAdagrad])


@for_tables
@pytest.mark.parametrize(
    "argument",
    [
        {"weight_decay": 0.1},
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
        {"amsgrad": True},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_what_would_change_all_rows_is_refused_by_name(kind, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"{kind.__name__}.*`{name}` must not be set"):
        kind(**argument)


@for_tables
@pytest.mark.parametrize("tables", ["(", None, 3])
def test_tables_must_be_a_regular_expression(kind, tables):
    with pytest.raises(ValueError, match="`tables` must be a regular expression"):
        kind(tables=tables)


@for_tables
def test_a_pattern_that_finds_no_table_is_reported(kind):
    table = keras.Variable(np.ones((3, 2)), name="items")
    with pytest.warns(UserWarning, match=r"`tables` finds none.*'users'.*items"):
        kind(tables="users").build([table])
