"""Gated linear units with stacked kernels (Shazeer 2020).

Axis letters: n rows, d input features, e experts, h hidden units, u output units.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.experts._protocol import GatedProduct, GroupedMatmul
from keras_moe.experts._stacked import StackedDense


@keras.saving.register_keras_serializable("keras_moe")
class GLUExperts(StackedDense):
    """e gated linear units of one shape: y = (activation(x G) * (x U)) D.

    With the activation "silu" this is SwiGLU, with "gelu" GEGLU, with "sigmoid" GLU.

    Args:
        num_experts: int, number of experts e.
        hidden_units: int, the hidden width h.
        units: int, the output width u. Defaults to the input width.
        activation: activation of the gate.
        use_bias: bool, whether each of the three matmuls adds a bias.
        dropout: float in [0, 1), dropout rate of the hidden units.
        kernel_initializer: initializer of one expert's kernel, applied independently
            to each expert and each of the three kernels.
        bias_initializer: initializer of the biases.
        kernel_regularizer: regularizer of every stacked kernel.
        bias_regularizer: regularizer of every stacked bias.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`; every expert computes every row.
        training: bool, whether dropout is active.

    Returns:
        A tensor of shape `(..., e, u)`.

    Attributes:
        gate_kernel: G, variable of shape `(e, d, h)`.
        up_kernel: U, variable of shape `(e, d, h)`.
        down_kernel: D, variable of shape `(e, h, u)`.

    Raises:
        ValueError: if an argument is invalid, or the last axis of the inputs has no
            static size.

    Example:

    >>> experts = keras_moe.experts.GLUExperts(num_experts=4, hidden_units=32)
    >>> experts(np.ones((2, 16))).shape == (2, 4, 16)
    True

    References:
        - [Shazeer, 2020: GLU Variants Improve Transformer](
          https://arxiv.org/abs/2002.05202)
    """

    num_matmuls = 3

    def __init__(
        self,
        num_experts: int,
        hidden_units: int,
        units: int | None = None,
        activation: Any = "silu",
        use_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, activation, use_bias, **kwargs)
        self.hidden_units = _checks.positive_int("hidden_units", hidden_units)
        self.units = None if units is None else _checks.positive_int("units", units)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        hidden, units = self.hidden_units, self.units or features
        self.gate_kernel, self.gate_bias = self._add_dense(
            0, features, hidden, kernel="gate_kernel", bias="gate_bias"
        )
        self.up_kernel, self.up_bias = self._add_dense(
            1, features, hidden, kernel="up_kernel", bias="up_bias"
        )
        self.down_kernel, self.down_bias = self._add_dense(
            2, hidden, units, kernel="down_kernel", bias="down_bias"
        )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if self.fast_in_turn:
            return self.in_turn(inputs, training)
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (1, -1, inputs.shape[-1]))
        rows = ops.broadcast_to(rows, (self.num_experts, *ops.shape(rows)[1:]))
        outputs = ops.transpose(self.on_slots(rows, training), (1, 0, 2))
        return ops.reshape(
            outputs,
            (*_backend.restored_axes(leading), self.num_experts, outputs.shape[-1]),
        )

    def on_rows(
        self, rows: Any, matmul: GroupedMatmul, training: bool | None = None
    ) -> Any:
        """Compute one expert per row, with the matmul of a dispatch."""
        gate = matmul(rows, self.gate_kernel, self.gate_bias)
        up = matmul(rows, self.up_kernel, self.up_bias)
        product = GatedProduct(self.activation)
        if training and self.dropout > 0.0:
            hidden = keras.random.dropout(
                product(gate, up), self.dropout, seed=self.seed_generator
            )
            return matmul(hidden, self.down_kernel, self.down_bias)
        return matmul((gate, up), self.down_kernel, self.down_bias, product)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        units = self.units or input_shape[-1]
        return (*input_shape[:-1], self.num_experts, units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "units": self.units,
        }
