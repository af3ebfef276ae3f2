"""Multi-layer perceptrons with stacked kernels (Jacobs et al. 1991).

Axis letters: n rows, d input features, e experts, h hidden units, u output units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.experts._protocol import GroupedMatmul, Prologue
from keras_moe.experts._stacked import StackedDense, activation_function


class StackedMLP(StackedDense):
    """MLPs of one shape with stacked kernels: experts, gates or the towers of tasks."""

    def __init__(
        self,
        num_experts: int,
        units: int | Sequence[int],
        activation: Any = "relu",
        use_bias: bool = True,
        *,
        final_activation: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, activation, use_bias, **kwargs)
        self.units = _checks.unit_sizes("units", units)
        self.num_matmuls = len(self.units)
        self.final_activation = activation_function(
            "final_activation", final_activation
        )
        self.kernels: list[Any] = []
        self.biases: list[Any] = []

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        # Without it, the reshapes in `call` could accept inputs of a wrong width.
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        for i, units in enumerate(self.units):
            kernel, bias = self._add_dense(
                i, features, units, kernel=f"kernel_{i}", bias=f"bias_{i}"
            )
            self.kernels.append(kernel)
            if bias is not None:
                self.biases.append(bias)
            features = units

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if self.fast_in_turn:
            return self.in_turn(inputs, training)
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        outputs = self._first_layer(rows, training)
        if len(self.units) > 1:
            outputs = ops.transpose(outputs, (1, 0, 2))  # (e, n, h)
            for i in range(1, len(self.units)):
                outputs = self._later_layer(i, outputs, training)
            outputs = ops.transpose(outputs, (1, 0, 2))  # (n, e, u)
        # A reshape can infer only one axis: -1 for the batch.
        return ops.reshape(
            outputs,
            (*_backend.restored_axes(leading), self.num_experts, self.units[-1]),
        )

    @property
    def fast_in_turn(self) -> bool:
        # Measured: one matmul for all experts is faster if each would be narrow.
        wide = self.units[0] >= (32 if len(self.units) > 1 else 64)
        return wide and super().fast_in_turn

    def on_rows(
        self, rows: Any, matmul: GroupedMatmul, training: bool | None = None
    ) -> Any:
        """Compute one expert per row, with the matmul of a dispatch."""
        prologue: Prologue | None = None
        for i, kernel in enumerate(self.kernels):
            rows = matmul(
                rows, kernel, self.biases[i] if self.biases else None, prologue
            )
            prologue = self.activation
            if training and self.dropout > 0.0 and i < len(self.units) - 1:
                rows, prologue = self._activate(i, rows, training), None
        return self.final_activation(rows)

    def _first_layer(self, rows: Any, training: bool | None) -> Any:
        """(n, d) -> (n, e, h): one matmul, because all experts have the same rows."""
        kernel = ops.transpose(self.kernels[0], (1, 0, 2))  # (d, e, h)
        outputs = ops.matmul(rows, ops.reshape(kernel, (rows.shape[-1], -1)))
        if self.use_bias:
            # `ops.add` lets TensorFlow fuse the bias into the matmul, `+` does not.
            outputs = ops.add(outputs, ops.reshape(self.biases[0], (-1,)))
        outputs = ops.reshape(outputs, (-1, self.num_experts, self.units[0]))
        return self._activate(0, outputs, training)

    def _later_layer(self, i: int, outputs: Any, training: bool | None) -> Any:
        """(e, n, in) -> (e, n, out): one matmul batched over the experts."""
        outputs = ops.matmul(outputs, self.kernels[i])
        if self.use_bias:
            outputs = outputs + ops.expand_dims(self.biases[i], 1)
        return self._activate(i, outputs, training)

    def _activate(self, i: int, outputs: Any, training: bool | None) -> Any:
        if i == len(self.units) - 1:
            return self.final_activation(outputs)
        outputs = self.activation(outputs)
        if training and self.dropout > 0.0:
            outputs = keras.random.dropout(
                outputs, self.dropout, seed=self.seed_generator
            )
        return outputs

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.num_experts, self.units[-1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "final_activation": keras.activations.serialize(self.final_activation),
        }


@keras.saving.register_keras_serializable("keras_moe")
class MLPExperts(StackedMLP):
    """e multi-layer perceptrons of the same shape, with stacked kernels.

    Args:
        num_experts: int, number of experts e.
        units: int or sequence of ints, the layer widths of an expert; the last one is
            the output width u.
        activation: activation of the hidden layers.
        use_bias: bool, whether every layer adds a bias.
        final_activation: activation of the last layer. Linear by default.
        dropout: float in [0, 1), dropout rate of every hidden layer.
        kernel_initializer: initializer of one expert's kernel, applied independently
            to each expert and layer (see `keras_moe.initializers.PerExpert`).
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
        kernels: list of one variable per layer, of shape `(e, in, out)`.
        biases: list of one variable per layer, of shape `(e, out)`; empty without bias.

    Raises:
        ValueError: if an argument is invalid, or the last axis of the inputs has no
            static size.

    Example:

    >>> experts = keras_moe.experts.MLPExperts(num_experts=4, units=(32, 8))
    >>> outputs = experts(np.ones((2, 16)))
    >>> outputs.shape == (2, 4, 8), experts.kernels[1].shape == (4, 32, 8)
    (True, True)

    References:
        - [Jacobs et al., 1991: Adaptive Mixtures of Local Experts](
          https://doi.org/10.1162/neco.1991.3.1.79)
    """
