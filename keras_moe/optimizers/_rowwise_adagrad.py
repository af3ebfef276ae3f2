"""Adagrad for tables with one accumulator a row."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.optimizers import _arguments, _tensorflow
from keras_moe.optimizers._lazy_adam import LazyAdam


@keras.saving.register_keras_serializable("keras_moe")
class RowwiseAdagrad(LazyAdam):
    """Adagrad with one accumulator for each row of a table; Adam for all else.

    For a row of a table with the gradient g, summed over its repetitions in the batch:

        accumulator <- accumulator + mean_over_columns(g^2)
        row <- row - rate g / (sqrt(accumulator) + epsilon)

    with `rate = learning_rate * table_learning_rate_multiplier`. The slots of a table
    of r rows and c columns have r values, where those of Adam have 2 r c. On
    TensorFlow, where the gradient of an embedding is sparse (`tf.IndexedSlices`), a
    step reads and writes only the rows of the batch. On JAX and torch the gradient is
    dense: the numbers are the same, but a step reads and writes the whole table.

    All variables that are not tables are updated as by `LazyAdam` with the multiplier
    1, which is Adam unless their gradient is sparse. For another optimizer of these,
    use `keras.optimizers.MultiOptimizer`.

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule`, or a
            function without arguments: that of Adam.
        beta_1: float, decay of m in Adam.
        beta_2: float, decay of v in Adam.
        epsilon: float, added to the roots in both.
        table_learning_rate_multiplier: float > 0. The steps of Adagrad shrink as the
            accumulators grow, so tables need a higher learning rate than Adam.
        initial_accumulator_value: float >= 0, start of the accumulators.
        tables: str, a regular expression: variables whose path it finds are tables. By
            default the weights of `keras.layers.Embedding`.
        **kwargs: as in `LazyAdam`.

    Raises:
        ValueError: if an argument is invalid, or if it would change all rows of a table
            in every step: `weight_decay`, `use_ema`, `gradient_accumulation_steps`; or
            for `amsgrad`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((3,), dtype="int32"), keras.layers.Embedding(100, 4)]
    ... )
    >>> model.compile(keras_moe.optimizers.RowwiseAdagrad(1e-3), "mse")
    >>> history = model.fit(np.array([[1, 7, 7]]), np.ones((1, 3, 4)), verbose=0)
    >>> [tuple(slot.shape) for slot in model.optimizer.variables[2:]]
    [(100,)]

    References:
        - [Adaptive Subgradient Methods](https://jmlr.org/papers/v12/duchi11a.html)
          (Duchi et al., 2011)
        - [Compositional Embeddings Using Complementary Partitions](https://arxiv.org/abs/1909.02107)
          (Shi et al., 2020)
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        *,
        table_learning_rate_multiplier: float = 10.0,
        initial_accumulator_value: float = 0.0,
        tables: str = _arguments.EMBEDDINGS,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            table_learning_rate_multiplier=table_learning_rate_multiplier,
            tables=tables,
            **kwargs,
        )
        self.initial_accumulator_value = _checks.non_negative_number(
            "initial_accumulator_value", initial_accumulator_value
        )

    def build(self, var_list: Any) -> None:
        if self.built:
            return
        super(keras.optimizers.Adam, self).build(var_list)
        self._table_indices = self._tables_among(var_list)
        momentums, velocities, accumulators = [], [], []
        for index, variable in enumerate(var_list):
            m, v, accumulator = None, None, None
            if index in self._table_indices:
                accumulator = self._accumulator_of(variable)
            else:
                names = ["momentum", "velocity"]
                (m,), (v,) = self.add_optimizer_variables([variable], names)
            momentums.append(m)
            velocities.append(v)
            accumulators.append(accumulator)
        self._momentums, self._velocities = momentums, velocities
        self._accumulators = accumulators

    def _accumulator_of(self, table: Any) -> Any:
        path = getattr(table, "path", table.name).replace("/", "_")
        options = {}
        layout = getattr(table, "_layout", None)
        if isinstance(layout, keras.distribution.TensorLayout):
            options["layout"] = keras.distribution.TensorLayout(
                layout.axes[:1], layout.device_mesh
            )
        return self.add_variable(
            shape=(table.shape[0],),
            initializer=keras.initializers.Constant(self.initial_accumulator_value),
            dtype=table.dtype,
            name=f"{path}_accumulator",
            **options,
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        if index not in self._table_indices:
            if _tensorflow.is_sparse(gradient):
                self._update_rows(gradient, variable, learning_rate)
            else:
                super().update_step(gradient, variable, learning_rate)
            return
        accumulator = self._accumulators[index]
        rate = ops.cast(learning_rate, variable.dtype)
        rate = rate * self.table_learning_rate_multiplier
        if _tensorflow.is_sparse(gradient):
            ids, sums = _tensorflow.row_gradients(gradient, variable)
            squares = _mean_square(sums)
            before = _tensorflow.slot_rows(accumulator, ids)
            rows = _tensorflow.table_rows(variable, ids)
            changes = self._change(sums, before + squares, rate)
            _tensorflow.change_slot(accumulator, ids, before, squares)
            _tensorflow.change_table(variable, ids, rows, changes)
            return
        gradient = ops.cast(gradient, variable.dtype)
        self.assign_add(accumulator, _mean_square(gradient))
        total = ops.convert_to_tensor(accumulator)
        self.assign_add(variable, self._change(gradient, total, rate))

    def _change(self, gradient: Any, total: Any, rate: Any) -> Any:
        """(rows, ...), (rows,) -> what is added to the rows."""
        # Without any gradient so far, and epsilon = 0, this would be 0 / 0.
        seen = total > 0
        total = ops.where(seen, total, ops.ones_like(total))
        scale = ops.where(seen, -rate / (ops.sqrt(total) + self.epsilon), 0)
        return gradient * ops.reshape(scale, (-1, *[1] * (len(gradient.shape) - 1)))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initial_accumulator_value": self.initial_accumulator_value,
        }


def _mean_square(gradient: Any) -> Any:
    """(rows, ...) -> (rows,)."""
    sizes = gradient.shape[1:]
    columns = tuple(range(1, 1 + len(sizes)))
    # `ops.mean` would round float64 to float32 on JAX and torch.
    return ops.sum(ops.square(gradient), axis=columns) / math.prod(sizes)
