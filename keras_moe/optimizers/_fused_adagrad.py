"""Adagrad whose update is one kernel on TensorFlow, and exact for sparse gradients."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe.optimizers import _arguments, _tensorflow
from keras_moe.optimizers._sparse_gradients import SparseGradients


@keras.saving.register_keras_serializable("keras_moe")
class FusedAdagrad(SparseGradients, keras.optimizers.Adagrad):
    """`keras.optimizers.Adagrad` in one pass over the memory of each variable.

    On TensorFlow without XLA, the update of a variable is one kernel
    (`ResourceApplyAdagrad`). A sparse gradient (`tf.IndexedSlices`, of an embedding)
    updates only its rows. This is the dense update, which does not change rows without
    a gradient.

    Differences from Keras: repeated rows of a sparse gradient are summed first, as in
    a dense gradient, where Keras adds the sum of their squares to the accumulator. The
    accumulators start at `initial_accumulator_value + epsilon` and nothing is added
    when the root is taken, which is the same update. Slots of Keras' Adagrad can be
    loaded; epsilon, 1e-7 beside 0.1, is then missing in them.

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule`, or a
            function without arguments.
        initial_accumulator_value: float >= 0, start of the sum of squared gradients.
        epsilon: float, added to it.
        **kwargs: `weight_decay`, `clipnorm`, `clipvalue`, `global_clipnorm`,
            `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps` and `name`, as in `keras.optimizers.Adagrad`.
            `weight_decay`, `use_ema` and `gradient_accumulation_steps` change all rows,
            so that a step reads the whole of a table.

    Raises:
        ValueError: if an argument is invalid, as in `keras.optimizers.Adagrad`; or for
            `ema_overwrite_frequency` and `gradient_accumulation_steps` on several
            `tf.distribute` replicas, where Keras' Adagrad fails.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_moe.optimizers.FusedAdagrad(0.1), "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    >>> int(model.optimizer.iterations)
    1

    References:
        - [Adaptive Subgradient Methods](https://jmlr.org/papers/v12/duchi11a.html)
          (Duchi et al., 2011)
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        **kwargs: Any,
    ) -> None:
        given = {
            "learning_rate": learning_rate,
            "initial_accumulator_value": initial_accumulator_value,
            "epsilon": epsilon,
            **kwargs,
        }
        super().__init__(**_arguments.checked(type(self).__name__, given))

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if self.gradient_accumulation_steps:
            grads = [_tensorflow.expand(g) for g in grads]
        super().apply(grads, trainable_variables)

    def build(self, var_list: Any) -> None:
        if self.built:
            return
        _arguments.refuse_under_replicas(self)
        super(keras.optimizers.Adagrad, self).build(var_list)
        self._accumulators = self.add_optimizer_variables(
            var_list,
            "accumulator",
            keras.initializers.Constant(self.initial_accumulator_value + self.epsilon),
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        accumulator = self._accumulators[self._get_variable_index(variable)]
        rate = ops.cast(learning_rate, variable.dtype)
        if _tensorflow.is_sparse(gradient):
            ids, sums = _tensorflow.row_gradients(gradient, variable)
            squares = ops.square(sums)
            before = _tensorflow.slot_rows(accumulator, ids)
            rows = _tensorflow.table_rows(variable, ids)
            total = before + squares
            # Rows of zeros fill up the gradient under XLA; they must not be 0 / 0.
            root = ops.sqrt(ops.where(total > 0, total, ops.ones_like(total)))
            _tensorflow.change_slot(accumulator, ids, before, squares)
            _tensorflow.change_table(variable, ids, rows, -rate * sums / root)
        elif _tensorflow.has_kernel_for(variable):
            _tensorflow.apply_adagrad(variable, accumulator, gradient, learning_rate)
        else:
            gradient = ops.cast(gradient, variable.dtype)
            self.assign_add(accumulator, ops.square(gradient))
            self.assign_sub(variable, rate * gradient / ops.sqrt(accumulator))
