"""Adam and AdamW whose update is one kernel on TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe.optimizers import _arguments, _tensorflow


@keras.saving.register_keras_serializable("keras_moe")
class FusedAdam(keras.optimizers.Adam):
    """`keras.optimizers.Adam` in one pass over the memory of each variable.

    On TensorFlow without XLA, Keras' update of a variable is a dozen operations, each
    of which reads and writes as many values as the variable has. Here it is one kernel
    (`ResourceApplyAdam`). Under XLA, which fuses these operations, and on JAX and torch
    the update is that of Keras.

    The arguments, the slots and the numbers are those of Keras' Adam: schedules,
    clipping, moving averages, gradient accumulation, loss scaling and files work as
    there. A file with the slots of Keras' Adam can be loaded.

    A sparse gradient (`tf.IndexedSlices`, of an embedding on TensorFlow) is made dense
    first. Keras' own Adam does not sum repeated rows there: the v of an id that is in a
    batch three times with gradient 1 grows by 3 instead of 9 (times `1 - beta_2`). Here
    it grows by 9 on every backend. See `LazyAdam` for tables of many rows.

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule`, or a
            function without arguments.
        beta_1: float, decay of m, the mean of the gradients.
        beta_2: float, decay of v, the mean of their squares.
        epsilon: float, added to the root of v.
        amsgrad: bool, whether the root is that of the largest v so far.
        weight_decay: float or None. With it the update is that of
            `keras.optimizers.AdamW`: before the update, the variable is multiplied by
            `1 - learning_rate * weight_decay`. `exclude_from_weight_decay` excludes
            variables.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps` and `name`, as in `keras.optimizers.Adam`.

    Raises:
        ValueError: if an argument is invalid, as in `keras.optimizers.Adam`; or for
            `ema_overwrite_frequency` and `gradient_accumulation_steps` on several
            `tf.distribute` replicas, where Keras' Adam fails.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_moe.optimizers.FusedAdam(1e-3, weight_decay=0.01), "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    >>> int(model.optimizer.iterations)
    1

    References:
        - [Adam](https://arxiv.org/abs/1412.6980) (Kingma & Ba, 2015), whose "epsilon
          hat" is `epsilon`
        - [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101)
          (Loshchilov & Hutter, 2019)
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        given = {
            "learning_rate": learning_rate,
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
            "amsgrad": amsgrad,
            **kwargs,
        }
        super().__init__(**_arguments.checked(type(self).__name__, given))

    def build(self, variables: Any) -> None:
        _arguments.refuse_under_replicas(self)
        super().build(variables)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply([self._received(g) for g in grads], trainable_variables)

    def _received(self, gradient: Any) -> Any:
        return _tensorflow.expand(gradient)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        if not _tensorflow.has_kernels():
            super()._apply_weight_decay(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if _tensorflow.has_kernels() and self.weight_decay is not None:
            self._decay(variable, learning_rate)
        if not _tensorflow.has_kernel_for(variable):
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        slots = [self._momentums[index], self._velocities[index]]
        if self.amsgrad:
            slots.append(self._velocity_hats[index])
        _tensorflow.apply_adam(
            variable,
            slots,
            gradient,
            learning_rate,
            self.beta_1,
            self.beta_2,
            self.iterations + 1,
            self.epsilon,
        )

    def _decay(self, variable: Any, learning_rate: Any) -> None:
        """As in Keras, but as one product with the variable instead of two."""
        if self._use_weight_decay(variable):
            rate = keras.ops.cast(learning_rate, variable.dtype)
            rate *= keras.ops.cast(self.weight_decay, variable.dtype)
            self.assign_sub(variable, variable * rate)
