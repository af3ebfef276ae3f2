"""A mixture with one shared expert behind a sigmoid gate (Qwen 2 and 3.5).

Axis letters: n tokens, d input features.

y_i = MoE(x_i) + sigmoid(x_i w) s(x_i), where the shared expert s is a gated linear unit
of its own width and w has one column.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._layer import given_or_attached
from keras_moe.experts import GLUExperts
from keras_moe.initializers import independent
from keras_moe.layers import MoE


@keras.saving.register_keras_serializable("keras_moe")
class GatedSharedMoE(MoE):
    """A `MoE` plus one shared expert, scaled per token by a sigmoid gate.

    The shared experts of `MoE` have the width of the routed ones and no gate. The
    shared expert of Qwen's models has its own width, and a gate.

    Args:
        num_experts: int, number of experts e. Default: that of `experts` or `router`.
        shared_hidden_units: int, the hidden width of the shared expert, a `GLUExperts`
            with the activation "silu" and without biases.
        **kwargs: further arguments of `keras_moe.layers.MoE`. The outputs of its
            experts must have the width of the inputs.

    Call arguments:
        inputs: tensor of shape `(..., d)`.
        mask: bool tensor of the leading axes, False for padding, as in `MoE`.
        router_inputs: inputs of the router, as in `MoE`. Default: `inputs`.
        training: bool, whether dropout and noise are active.

    Returns:
        A tensor of shape `(..., d)`.

    Attributes:
        shared_expert: a `GLUExperts` of one expert.
        shared_gate: a `Dense` layer with one unit and no bias.

    Raises:
        ValueError: if an argument is invalid, or the experts have outputs of another
            width than the inputs.

    Example:

    >>> experts = keras_moe.experts.GLUExperts(num_experts=8, hidden_units=32)
    >>> moe = GatedSharedMoE(shared_hidden_units=64, experts=experts)
    >>> moe(np.ones((4, 16))).shape == (4, 16)
    True

    References:
        - [Qwen Team, 2024: Qwen1.5-MoE: Matching 7B Model Performance with 1/3
          Activated Parameters](https://qwenlm.github.io/blog/qwen-moe/)
    """

    def __init__(
        self,
        num_experts: int | None = None,
        *args: Any,
        shared_hidden_units: int,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, *args, name=name, **kwargs)
        self.shared_hidden_units = _checks.positive_int(
            "shared_hidden_units", shared_hidden_units
        )
        self.shared_expert = GLUExperts(
            1,
            self.shared_hidden_units,
            kernel_initializer=independent(self.kernel_initializer, 1),
            dtype=self.dtype_policy,
            name="shared_expert",
        )
        self.shared_gate = keras.layers.Dense(
            1, use_bias=False, dtype=self.dtype_policy, name="shared_gate"
        )

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        router_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        super().build(inputs_shape, router_inputs_shape)
        outputs_shape = self.compute_output_shape(inputs_shape)
        if outputs_shape[-1] != inputs_shape[-1]:
            raise ValueError(
                "the experts must have outputs of the width of the inputs, as the "
                f"shared expert has. Received: outputs of width {outputs_shape[-1]} "
                f"for inputs of width {inputs_shape[-1]}"
            )
        rows_shape = (None, inputs_shape[-1])
        self.shared_expert.build(rows_shape)
        self.shared_gate.build(rows_shape)

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool | None = None,
        router_inputs: Any = None,
    ) -> Any:
        mask = given_or_attached(mask, inputs)
        routed = super().call(inputs, mask, training, router_inputs)
        if mask is not None:
            # Values in padding, including NaN, must not reach outputs or gradients.
            mask = ops.expand_dims(ops.cast(mask, "bool"), -1)
            inputs = ops.where(mask, inputs, ops.zeros_like(inputs))
        # Of zeros, the shared expert without biases is zero.
        shared = ops.squeeze(self.shared_expert(inputs, training=training), -2)
        return routed + ops.sigmoid(self.shared_gate(inputs)) * shared

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "shared_hidden_units": self.shared_hidden_units,
        }
