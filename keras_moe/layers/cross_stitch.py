"""Cross-stitch networks: one MLP per task, with learned mixing of activations.

Axis letters: n rows, d input features, t tasks, h hidden units, u output units.

After every layer, the activations of task i become sum_j A_ij x_j, where x_j are the
activations of task j and A is learned (Misra et al. 2016, equation 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.layers._mlp_layer import TaskLayer
from keras_moe.layers._towers import run_towers


@keras.saving.register_keras_serializable("keras_moe")
class CrossStitch(TaskLayer):
    """One MLP per task, with learned linear mixing across tasks after each layer.

    How much two tasks share is learned for every layer; an identity A means separate
    MLPs. It returns outputs in the same form as `MMoE`, so either can replace the
    other.

    Args:
        units: int or sequence of ints, the widths of the layers of every task's MLP.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        self_weight: float in [0, 1], the initial weight of a task's own activations.
            The other tasks share `1 - self_weight` evenly, so the initial weights sum
            to 1.
        per_unit: bool, whether each unit has its own weight for each pair of tasks
            (the paper has one per channel). By default all units share it.
        activation: activation of every layer, the last one included.
        dropout: float in [0, 1), fraction of each hidden layer's units to drop,
            before the mixing.
        kernel_initializer: initializer of one task's kernel; each task and each layer
            gets its own draw.
        kernel_regularizer: regularizer of the stacked kernels.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., units[-1])` for each task: a dict by task name if
        `tasks` is a sequence of names, a list if it is a number.

    Attributes:
        stitches: one variable A per layer, of shape `(t, t)`, or `(t, t, h)` with
            `per_unit`; row i holds the weights into task i. Empty for one task.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> layer = keras_moe.layers.CrossStitch((32, 16), tasks=["click", "buy"])
    >>> outputs = layer(np.ones((2, 8)))
    >>> outputs["buy"].shape == (2, 16), layer.stitches[0].shape == (2, 2)
    (True, True)

    The paper uses a 100 to 1000 times larger learning rate for A; here all weights use
    the optimizer's learning rate.

    References:
        - [Misra et al., 2016: Cross-stitch Networks for Multi-task Learning](
          https://arxiv.org/abs/1604.03539)
    """

    def __init__(
        self,
        units: int | Sequence[int],
        tasks: int | Sequence[str],
        *,
        self_weight: float = 0.9,
        per_unit: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, **kwargs)
        self.units = _checks.unit_sizes("units", units)
        self.self_weight = _checked_self_weight(self_weight)
        self.per_unit = _checks.flag("per_unit", per_unit)
        self.towers = self.make_mlps(self._tasks.count, self.units, name="towers")
        self.stitches: list[Any] = []

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        _checks.last_dimension(type(self).__name__, input_shape)
        self.towers.build(input_shape)
        self.input_spec = self.towers.input_spec
        t = self._tasks.count
        if t == 1:
            return
        for i, units in enumerate(self.units):
            self.stitches.append(
                self.add_weight(
                    name=f"stitch_{i}",
                    shape=(t, t, units) if self.per_unit else (t, t),
                    initializer=self._initial_stitch,
                )
            )

    def _initial_stitch(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        t = shape[0]
        own = np.eye(t)
        stitch = self.self_weight * own + (1 - self.self_weight) / (t - 1) * (1 - own)
        stitch = np.reshape(stitch, (t, t) + (1,) * (len(shape) - 2))
        return ops.convert_to_tensor(np.broadcast_to(stitch, shape), dtype)

    def call(
        self, inputs: Any, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        outputs = run_towers(self.towers, inputs, self._stitch, training)
        return self._tasks.pack(outputs)

    def _stitch(self, i: int, activations: Any) -> Any:
        """(t, n, h) -> (t, n, h), equation 1."""
        if not self.stitches:
            return activations
        stitch, (t, _, h) = self.stitches[i], activations.shape
        if self.per_unit:
            return ops.einsum("ijh,jnh->inh", stitch, activations)
        mixed = ops.matmul(stitch, ops.reshape(activations, (t, -1)))
        return ops.reshape(mixed, (t, -1, h))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> Any:
        return self._tasks.repeat((*input_shape[:-1], self.units[-1]))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "self_weight": self.self_weight,
            "per_unit": self.per_unit,
        }


def _checked_self_weight(value: Any) -> float:
    weight = _checks.finite_number("self_weight", value)
    if not 0.0 <= weight <= 1.0:
        raise ValueError(
            f"`self_weight` must be in [0, 1]. Received: self_weight={value!r}"
        )
    return weight
