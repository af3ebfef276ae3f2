"""PEPNet: gates from prior features scale the embedding and the hidden units.

Axis letters: n rows, d input features, p prior features, t tasks, h hidden units,
u output units.

A gate unit (Gate NU) outputs gates between 0 and a scale gamma, near 1 for gamma = 2:
gates = gamma * sigmoid(relu(z W + b) W' + b'). With E the shared embedding, F_d the
domain features, P the prior features of user, item and author, and sg the stop-gradient
(Chang et al. 2023):

EPNet:  O = gates([F_d, sg(E)]) * E, the domain-specific embedding.
PPNet:  H_1 = f(O W_0 + b_0), H_l+1 = f((gates_l([P, sg(O)]) * H_l) W_l + b_l), with
        separate towers and gates for each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.initializers import independent
from keras_moe.layers._mlp_layer import MLP_ARGUMENTS, TaskLayer
from keras_moe.layers._parts import (
    Adaptable,
    check_leading_axes,
    checked_rows,
    layer_name,
)
from keras_moe.layers._towers import run_towers


@keras.saving.register_keras_serializable("keras_moe")
class GateNU(Adaptable):
    """Gate unit: two dense layers that output gates between 0 and `scale`.

    `scale * sigmoid(relu(x W + b) W' + b')`. With a scale of 2, gates start near 1, so
    they barely change the gated values at initialization.

    Args:
        units: int, number of gates u.
        hidden_units: int, width of the hidden layer. `units` by default.
        scale: float > 0, the largest value of a gate.
        kernel_initializer: initializer of the two kernels, drawn independently.

    Call arguments:
        inputs: tensor of shape `(..., d)`.

    Returns:
        A tensor of shape `(..., u)`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> gate = keras_moe.layers.GateNU(16)
    >>> gate(np.ones((2, 8))).shape == (2, 16)
    True

    Gates are computed in float32 under any dtype policy, then cast once.

    References:
        - [Chang et al., 2023: PEPNet: Parameter and Embedding Personalized Network for
          Infusing with Personalized Prior Information](
          https://doi.org/10.1145/3580305.3599884)
    """

    def __init__(
        self,
        units: int,
        hidden_units: int | None = None,
        scale: float = 2.0,
        *,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = _checks.positive_int("units", units)
        self.hidden_units = _checked_width("hidden_units", hidden_units)
        self.scale = _checks.positive_number("scale", scale)
        self.kernel_initializer = _checks.initializer(
            "kernel_initializer", kernel_initializer
        )
        self.hidden = self._dense("hidden", self.hidden_units or self.units, "relu")
        self.gates = self._dense("gates", self.units, "sigmoid")

    def _dense(self, name: str, units: int, activation: str) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            activation,
            kernel_initializer=independent(self.kernel_initializer, *name.encode()),
            dtype=self.precise_dtype,
            name=name,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        _checks.last_dimension(type(self).__name__, input_shape)
        self.hidden.build(input_shape)
        self.gates.build(self.hidden.compute_output_shape(input_shape))

    def call(self, inputs: Any) -> Any:
        gates = self.scale * self.gates(self.hidden(inputs))
        return ops.cast(gates, self.compute_dtype)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "hidden_units": self.hidden_units,
            "scale": self.scale,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable("keras_moe")
class EPNet(Adaptable):
    """Scales an embedding by gates computed from domain features.

    Domain features (scenario, page, market) give a gate for every unit of the shared
    embedding. The embedding is an input of the gates too, with its gradient stopped
    there.

    Args:
        gate_units: int, width of the hidden layer of the gates. Default: the width of
            the embedding.
        gate_scale: float > 0, the largest value of a gate.
        gate_kernel_initializer: initializer of the gates' kernels; each gets its own
            draw.

    Call arguments:
        inputs: tensor of shape `(..., d)`, the shared embedding.
        domain_inputs: tensor of shape `(..., p)` with the leading axes of `inputs`,
            embedded features of the domain.

    Returns:
        A tensor of shape `(..., d)`.

    Raises:
        ValueError: if an argument is invalid, or the leading axes of
            `domain_inputs` are not those of `inputs`.

    Example:

    >>> epnet = keras_moe.layers.EPNet()
    >>> epnet(np.ones((2, 8)), np.ones((2, 3))).shape == (2, 8)
    True

    References:
        - [Chang et al., 2023: PEPNet: Parameter and Embedding Personalized Network for
          Infusing with Personalized Prior Information](
          https://doi.org/10.1145/3580305.3599884)
    """

    def __init__(
        self,
        gate_units: int | None = None,
        gate_scale: float = 2.0,
        *,
        gate_kernel_initializer: Any = "glorot_uniform",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=layer_name(name, "epnet"), **kwargs)
        self.supports_masking = True
        self.gate_units = _checked_width("gate_units", gate_units)
        self.gate_scale = _checks.positive_number("gate_scale", gate_scale)
        self.gate_kernel_initializer = _checks.initializer(
            "gate_kernel_initializer", gate_kernel_initializer
        )

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        domain_inputs_shape: tuple[int | None, ...],
    ) -> None:
        name = type(self).__name__
        features = _checks.last_dimension(name, inputs_shape)
        check_leading_axes("domain_inputs", domain_inputs_shape, inputs_shape)
        domain_features = _checks.last_dimension(name, domain_inputs_shape)
        # Without this check, an embedding of one unit would be broadcast.
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        self.gate = GateNU(
            features,
            self.gate_units,
            self.gate_scale,
            kernel_initializer=self.gate_kernel_initializer,
            dtype=self.dtype_policy,
            name="gate",
        )
        self.gate.build((*inputs_shape[:-1], domain_features + features))

    def call(self, inputs: Any, domain_inputs: Any) -> Any:
        domain_inputs = checked_rows("domain_inputs", domain_inputs, inputs)
        inputs = ops.cast(inputs, self.compute_dtype)  # Inputs may be integers.
        embedding = ops.stop_gradient(inputs)
        gate_inputs = ops.concatenate([domain_inputs, embedding], axis=-1)
        return self.gate(gate_inputs) * inputs

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        domain_inputs_shape: tuple[int | None, ...],
    ) -> tuple[int | None, ...]:
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "gate_units": self.gate_units,
            "gate_scale": self.gate_scale,
            "gate_kernel_initializer": keras.initializers.serialize(
                self.gate_kernel_initializer
            ),
        }


@keras.saving.register_keras_serializable("keras_moe")
class PPNet(TaskLayer, Adaptable):
    """One MLP per task, whose hidden units are scaled by gates from prior features.

    Prior features of user, item and author give a gate for every unit of every layer
    and task, which personalizes the MLP for each row. The inputs of the MLP are inputs
    of the gates too, with their gradient stopped there.

    Args:
        units: int or sequence of ints, the widths of the layers of every task's MLP.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        gate_units: int, width of the hidden layer of the gates; each layer has one gate
            unit for all tasks. Default: the width of the layer that is scaled.
        gate_scale: float > 0, the largest value of a gate.
        activation: activation of every layer, the last one included. Gates multiply
            its outputs.
        use_bias: bool, whether every layer of the MLPs adds a bias.
        dropout: float in [0, 1), fraction of each hidden layer's units to drop.
        kernel_initializer: initializer of one task's kernel; each task and each layer
            gets its own draw.
        kernel_regularizer: regularizer of the stacked kernels.
        gate_kernel_initializer: initializer of the gates' kernels; each gets its own
            draw.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually the output of `EPNet`.
        prior_inputs: tensor of shape `(..., p)` with the leading axes of `inputs`,
            embedded features of user, item and author. By default the gates read
            `inputs` only.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., units[-1])` for each task: a dict by task name if
        `tasks` is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid, or the leading axes of
            `prior_inputs` are not those of `inputs`.

    Example:

    >>> ppnet = keras_moe.layers.PPNet((32, 16), tasks=["click", "buy"])
    >>> ppnet(np.ones((2, 8)), np.ones((2, 3)))["buy"].shape == (2, 16)
    True

    As in the paper, the prediction layer has no gates: here it is a separate `Tower`
    after this layer, and every layer of this one has gates.

    References:
        - [Chang et al., 2023: PEPNet: Parameter and Embedding Personalized Network for
          Infusing with Personalized Prior Information](
          https://doi.org/10.1145/3580305.3599884)
    """

    def __init__(
        self,
        units: int | Sequence[int],
        tasks: int | Sequence[str],
        *,
        gate_units: int | None = None,
        gate_scale: float = 2.0,
        gate_kernel_initializer: Any = "glorot_uniform",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, name=layer_name(name, "ppnet"), **kwargs)
        self.units = _checks.unit_sizes("units", units)
        self.gate_units = _checked_width("gate_units", gate_units)
        self.gate_scale = _checks.positive_number("gate_scale", gate_scale)
        self.gate_kernel_initializer = _checks.initializer(
            "gate_kernel_initializer", gate_kernel_initializer
        )
        self.towers = self.make_mlps(self._tasks.count, self.units, name="towers")
        self.gates = [
            GateNU(
                self._tasks.count * width,
                self.gate_units or width,
                self.gate_scale,
                kernel_initializer=independent(self.gate_kernel_initializer, i),
                dtype=self.dtype_policy,
                name=f"gate_{i}",
            )
            for i, width in enumerate(self.units)
        ]

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        prior_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        name = type(self).__name__
        _checks.last_dimension(name, inputs_shape)
        check_leading_axes("prior_inputs", prior_inputs_shape, inputs_shape)
        self.towers.build(inputs_shape)
        self.input_spec = self.towers.input_spec
        gate_features = _checks.last_dimension(name, inputs_shape)
        if prior_inputs_shape is not None:
            gate_features += _checks.last_dimension(name, prior_inputs_shape)
        for gate in self.gates:
            gate.build((*inputs_shape[:-1], gate_features))

    def call(
        self, inputs: Any, prior_inputs: Any = None, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        gate_inputs = ops.stop_gradient(inputs)
        if prior_inputs is not None:
            prior_inputs = checked_rows("prior_inputs", prior_inputs, inputs)
            gate_inputs = ops.concatenate([prior_inputs, gate_inputs], axis=-1)

        def scaled(i: int, activations: Any) -> Any:
            return self._gates_of_layer(i, gate_inputs) * activations

        outputs = run_towers(self.towers, inputs, scaled, training)
        return self._tasks.pack(outputs)

    def _gates_of_layer(self, i: int, gate_inputs: Any) -> Any:
        """(..., p + d) -> (t, n, h)."""
        shape = (-1, self._tasks.count, self.units[i])
        return ops.transpose(ops.reshape(self.gates[i](gate_inputs), shape), (1, 0, 2))

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        prior_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> Any:
        return self._tasks.repeat((*inputs_shape[:-1], self.units[-1]))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "gate_units": self.gate_units,
            "gate_scale": self.gate_scale,
            "gate_kernel_initializer": keras.initializers.serialize(
                self.gate_kernel_initializer
            ),
        }


@keras.saving.register_keras_serializable("keras_moe")
class PEPNet(Adaptable):
    """`EPNet`, then `PPNet`: gates on the embedding and on the task towers.

    For models of several domains and tasks. It returns outputs in the same form as
    `MMoE`, so either can replace the other.

    Args:
        units: int or sequence of ints, the widths of the layers of every task's MLP.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        gate_units: int, width of the hidden layer of the gates of `EPNet` and `PPNet`.
            Default: the width of the layer that is scaled.
        gate_scale: float > 0, the largest value of a gate.
        activation: activation of every layer of the towers, the last one included.
        use_bias: bool, whether every layer of the MLPs adds a bias.
        dropout: float in [0, 1), fraction of each hidden layer's units to drop.
        kernel_initializer: initializer of one task's kernel.
        kernel_regularizer: regularizer of the stacked kernels of the towers.
        gate_kernel_initializer: initializer of the gates' kernels; each gets its own
            draw.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`, the shared embedding.
        domain_inputs: tensor of shape `(..., p)`, embedded features of the domain.
        prior_inputs: tensor of shape `(..., q)`, embedded features of user, item and
            author. By default the gates of the towers read the scaled embedding only.
            All inputs have the same leading axes.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., units[-1])` for each task: a dict by task name if
        `tasks` is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid, or inputs differ in leading axes.

    Example:

    >>> pepnet = keras_moe.layers.PEPNet((32, 16), tasks=["click", "buy"])
    >>> outputs = pepnet(np.ones((2, 8)), np.ones((2, 3)), np.ones((2, 4)))
    >>> outputs["buy"].shape == (2, 16)
    True

    References:
        - [Chang et al., 2023: PEPNet: Parameter and Embedding Personalized Network for
          Infusing with Personalized Prior Information](
          https://doi.org/10.1145/3580305.3599884)
    """

    def __init__(
        self,
        units: int | Sequence[int],
        tasks: int | Sequence[str],
        *,
        gate_units: int | None = None,
        gate_scale: float = 2.0,
        gate_kernel_initializer: Any = "glorot_uniform",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        towers = {key: kwargs.pop(key) for key in MLP_ARGUMENTS if key in kwargs}
        super().__init__(name=layer_name(name, "pepnet"), **kwargs)
        self.supports_masking = True
        self.ppnet = PPNet(
            units,
            tasks,
            gate_units=gate_units,
            gate_scale=gate_scale,
            gate_kernel_initializer=gate_kernel_initializer,
            **towers,
            dtype=self.dtype_policy,
            name="ppnet",
        )
        self.epnet = EPNet(
            gate_units,
            gate_scale,
            gate_kernel_initializer=gate_kernel_initializer,
            dtype=self.dtype_policy,
            name="epnet",
        )

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The keys of the outputs: task names, or 0 to t - 1 for a number of tasks."""
        return self.ppnet.tasks

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        domain_inputs_shape: tuple[int | None, ...],
        prior_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        _checks.last_dimension(type(self).__name__, inputs_shape)
        self.epnet.build(inputs_shape, domain_inputs_shape)
        self.ppnet.build(inputs_shape, prior_inputs_shape)

    def call(
        self,
        inputs: Any,
        domain_inputs: Any,
        prior_inputs: Any = None,
        training: bool | None = None,
    ) -> dict[str, Any] | list[Any]:
        embedding = self.epnet(inputs, domain_inputs)
        return self.ppnet(embedding, prior_inputs, training=training)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return self.ppnet.compute_mask(inputs, mask)

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        domain_inputs_shape: tuple[int | None, ...],
        prior_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> Any:
        return self.ppnet.compute_output_shape(inputs_shape, prior_inputs_shape)

    def get_config(self) -> dict[str, Any]:
        ppnet = self.ppnet.get_config()
        gates = ("gate_units", "gate_scale", "gate_kernel_initializer")
        kept = ("units", "tasks", *gates, *MLP_ARGUMENTS)
        return {**super().get_config(), **{name: ppnet[name] for name in kept}}


def _checked_width(name: str, value: Any) -> int | None:
    return None if value is None else _checks.positive_int(name, value)
