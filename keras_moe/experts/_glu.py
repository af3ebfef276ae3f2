"""Gated linear units with stacked kernels (Shazeer 2020).

Axis letters: n rows, d input features, e experts, h hidden units, u output units.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.experts._protocol import GroupedMatmul
from keras_moe.experts._stacked import StackedExperts, activation_function
from keras_moe.initializers import PerExpert


@keras.saving.register_keras_serializable("keras_moe")
class GLUExperts(StackedExperts):
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

    def __init__(
        self,
        num_experts: int,
        hidden_units: int,
        units: int | None = None,
        activation: Any = "silu",
        use_bias: bool = False,
        *,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.hidden_units = _checks.positive_int("hidden_units", hidden_units)
        self.units = None if units is None else _checks.positive_int("units", units)
        self.activation = activation_function("activation", activation)
        self.use_bias = use_bias
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.seed = seed
        if self.dropout > 0.0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        units = self.units or features
        self.gate_kernel, self.gate_bias = self._add_dense(
            "gate", 0, features, self.hidden_units
        )
        self.up_kernel, self.up_bias = self._add_dense(
            "up", 1, features, self.hidden_units
        )
        self.down_kernel, self.down_bias = self._add_dense(
            "down", 2, self.hidden_units, units
        )

    def _add_dense(
        self, name: str, stream: int, inputs: int, outputs: int
    ) -> tuple[Any, Any]:
        kernel = self.add_weight(
            name=f"{name}_kernel",
            shape=(self.num_experts, inputs, outputs),
            initializer=PerExpert(self.kernel_initializer, stream=stream),
            regularizer=self.kernel_regularizer,
        )
        if not self.use_bias:
            return kernel, None
        bias = self.add_weight(
            name=f"{name}_bias",
            shape=(self.num_experts, outputs),
            initializer=PerExpert(self.bias_initializer, stream=3 + stream),
            regularizer=self.bias_regularizer,
        )
        return kernel, bias

    def call(self, inputs: Any, training: bool | None = None) -> Any:
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
        if training and self.dropout > 0.0:
            hidden = keras.random.dropout(
                self._product(gate, up), self.dropout, seed=self.seed_generator
            )
            return matmul(hidden, self.down_kernel, self.down_bias)
        return matmul((gate, up), self.down_kernel, self.down_bias, self._product)

    def _product(self, gate: Any, up: Any) -> Any:
        return self.activation(gate) * up

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        units = self.units or input_shape[-1]
        return (*input_shape[:-1], self.num_experts, units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_units": self.hidden_units,
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "seed": self.seed,
        }
