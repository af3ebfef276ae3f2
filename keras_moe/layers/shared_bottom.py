"""One MLP for all tasks: the multi-task baseline.

y_t = f(x) for every task t (Caruana 1997).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.layers._mlp_layer import TaskLayer


@keras.saving.register_keras_serializable("keras_moe")
class SharedBottom(TaskLayer):
    """One MLP shared by all tasks: the classical multi-task baseline.

    It returns outputs in the same form as `MMoE`, so either can replace the other.

    Args:
        units: int or sequence of ints, the widths of the layers.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        activation: activation of every layer, the last one included.
        use_bias: bool, whether every layer adds a bias.
        dropout: float in [0, 1), fraction of each hidden layer's units to drop.
        kernel_initializer: initializer of the kernels.
        kernel_regularizer: regularizer of the kernels.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`.
        training: bool, whether dropout is active.

    Returns:
        The same tensor of shape `(..., units[-1])` for each task: a dict by task
        name if `tasks` is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> bottom = keras_moe.layers.SharedBottom((32, 16), tasks=["click", "buy"])
    >>> outputs = bottom(np.ones((2, 8)))
    >>> outputs["click"].shape == (2, 16)
    True

    References:
        - [Caruana, 1997: Multitask Learning](https://doi.org/10.1023/A:1007379606734)
    """

    def __init__(
        self,
        units: int | Sequence[int],
        tasks: int | Sequence[str],
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, **kwargs)
        self.units = _checks.unit_sizes("units", units)
        # A shared bottom is a mixture of one expert with gate 1.
        self.bottom = self.make_mlps(1, self.units, name="bottom")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        _checks.last_dimension(type(self).__name__, input_shape)
        self.bottom.build(input_shape)

    def call(
        self, inputs: Any, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        outputs = ops.squeeze(self.bottom(inputs, training=training), axis=-2)
        return self._tasks.repeat(outputs)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> Any:
        return self._tasks.repeat((*input_shape[:-1], self.units[-1]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}
