"""Adam that updates only the rows of a table that have a gradient."""

from __future__ import annotations

import re
import warnings
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.optimizers import _arguments, _tensorflow
from keras_moe.optimizers._fused_adam import FusedAdam
from keras_moe.optimizers._sparse_gradients import SparseGradients


@keras.saving.register_keras_serializable("keras_moe")
class LazyAdam(SparseGradients, FusedAdam):
    """Adam that updates only the rows of a table that have a gradient in this step.

    On TensorFlow, where the gradient of an embedding is sparse (`tf.IndexedSlices`), a
    step reads and writes only these rows of the table and its slots, so that its time
    and its memory do not depend on the number of rows. All other variables are updated
    as by `FusedAdam`.

    For a row of a table with the gradient g, summed over its repetitions in the batch,
    in step t (of the optimizer, not of the row):

        m <- m + (1 - beta_1) (g - m)
        v <- v + (1 - beta_2) (g^2 - v)
        row <- row - rate_t m / (sqrt(v) + epsilon)

    with `rate_t = learning_rate * table_learning_rate_multiplier * sqrt(1 - beta_2^t) /
    (1 - beta_1^t)`. If g is zero in all columns, the row and its slots stay as they
    are, where Adam would let m and v decay and m move the row. If every row has a
    gradient in every step, and the multiplier is 1, this is Adam.

    Bias correction counts the steps of the optimizer, as in the LazyAdam of TensorFlow
    Addons. A row that is first seen late in training has m = 0.1 g and v = 0.001 g^2,
    nearly without correction, and moves by 3.2 times the learning rate. With Adam, m
    would go on to move it: by ten times as much, if no further gradient comes. Tables
    of which each batch has few rows may therefore need a higher learning rate here.

    On JAX and torch the gradient of a table is dense. The numbers are the same, but a
    step reads and writes the whole table.

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule`, or a
            function without arguments.
        beta_1: float, decay of m.
        beta_2: float, decay of v.
        epsilon: float, added to the root of v.
        table_learning_rate_multiplier: float > 0, learning rate of the tables over that
            of all other variables.
        tables: str, a regular expression: variables whose path it finds are tables. By
            default the weights of `keras.layers.Embedding`. On TensorFlow, variables
            with a sparse gradient are tables, too.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `loss_scale_factor` and
            `name`, as in `keras.optimizers.Adam`. Gradients are clipped by the norm of
            the dense gradient, in which repeated rows are summed.

    Raises:
        ValueError: if an argument is invalid, or if it would change all rows of a table
            in every step: `weight_decay`, `use_ema`, `gradient_accumulation_steps`; or
            for `amsgrad`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((3,), dtype="int32"), keras.layers.Embedding(100, 4)]
    ... )
    >>> model.compile(keras_moe.optimizers.LazyAdam(1e-3), "mse")
    >>> before = model.get_weights()[0]
    >>> history = model.fit(np.array([[1, 7, 7]]), np.ones((1, 3, 4)), verbose=0)
    >>> np.flatnonzero((model.get_weights()[0] != before).any(axis=1))
    array([1, 7])

    References:
        - [Adam](https://arxiv.org/abs/1412.6980) (Kingma & Ba, 2015)
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        *,
        table_learning_rate_multiplier: float = 1.0,
        tables: str = _arguments.EMBEDDINGS,
        **kwargs: Any,
    ) -> None:
        kwargs = _arguments.checked(type(self).__name__, kwargs)
        _arguments.refuse_for_tables(type(self).__name__, kwargs)
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            **kwargs,
        )
        self.table_learning_rate_multiplier = _checks.positive_number(
            "table_learning_rate_multiplier", table_learning_rate_multiplier
        )
        self.tables = _arguments.checked_pattern(tables)

    def build(self, var_list: Any) -> None:
        if self.built:
            return
        super().build(var_list)
        self._table_indices = self._tables_among(var_list)

    def _tables_among(self, variables: Any) -> frozenset[int]:
        """Return the indices of the tables."""
        paths = [getattr(variable, "path", variable.name) for variable in variables]
        found = [i for i, path in enumerate(paths) if re.search(self.tables, path)]
        if not found and self.tables != _arguments.EMBEDDINGS:
            warnings.warn(
                f"{type(self).__name__}: `tables` finds none of the variables. "
                f"Received: tables={self.tables!r} for the paths {paths}",
                stacklevel=2,
            )
        return frozenset(found)

    def _received(self, gradient: Any) -> Any:
        return gradient

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        table_rate = learning_rate * self.table_learning_rate_multiplier
        if _tensorflow.is_sparse(gradient):
            self._update_rows(gradient, variable, table_rate)
        elif self._get_variable_index(variable) in self._table_indices:
            self._update_table(gradient, variable, table_rate)
        else:
            super().update_step(gradient, variable, learning_rate)

    def _update_rows(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        ids, sums = _tensorflow.row_gradients(gradient, variable)
        rows = _tensorflow.table_rows(variable, ids)
        slots = (self._momentums[index], self._velocities[index])
        m, v = (_tensorflow.slot_rows(slot, ids) for slot in slots)
        update, *changes = self._changes(sums, m, v, learning_rate)
        for slot, before, change in zip(slots, (m, v), changes, strict=True):
            _tensorflow.change_slot(slot, ids, before, change)
        _tensorflow.change_table(variable, ids, rows, update)

    def _update_table(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        slots = (variable, self._momentums[index], self._velocities[index])
        m, v = (ops.convert_to_tensor(slot) for slot in slots[1:])
        changes = self._changes(gradient, m, v, learning_rate)
        for slot, change in zip(slots, changes, strict=True):
            self.assign_add(slot, change)

    def _changes(self, gradient: Any, m: Any, v: Any, learning_rate: Any) -> list[Any]:
        """(rows, ...) -> what is added to the variable, m and v."""
        dtype = m.dtype
        gradient = ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        correction_1 = 1 - ops.power(ops.cast(self.beta_1, dtype), step)
        correction_2 = 1 - ops.power(ops.cast(self.beta_2, dtype), step)
        rate = ops.cast(learning_rate, dtype) * ops.sqrt(correction_2) / correction_1
        m_change = (gradient - m) * (1 - self.beta_1)
        v_change = (ops.square(gradient) - v) * (1 - self.beta_2)
        update = -rate * (m + m_change) / (ops.sqrt(v + v_change) + self.epsilon)
        columns = tuple(range(1, len(gradient.shape)))
        seen = ops.any(gradient != 0, axis=columns, keepdims=True)
        return [
            ops.where(seen, change, ops.zeros_like(change))
            for change in (update, m_change, v_change)
        ]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "table_learning_rate_multiplier": self.table_learning_rate_multiplier,
            "tables": self.tables,
        }
