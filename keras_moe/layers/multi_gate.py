"""One input, several tasks: the shared bottom and the multi-gate mixture of experts.

Axis letters: n rows, d input features, e experts, t tasks, u expert output units.

With experts f_k and gates g_t (Ma et al. 2018, equations 6 and 7):
y_t = sum_k g_t(x)_k f_k(x),  g_t(x) = softmax(W_t x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.experts import MLPExperts
from keras_moe.layers._parts import default_name
from keras_moe.layers._tasks import Tasks


@keras.saving.register_keras_serializable("keras_moe")
class MMoE(keras.layers.Layer):
    """Multi-gate Mixture-of-Experts: tasks share experts, each mixes them its own way.

    Every task has its own softmax gate over one pool of experts, so related tasks
    can lean on the same experts and conflicting ones on different experts.

    Args:
        num_experts: int, number of shared experts e.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        top_k: int, if given each gate keeps its k largest weights and renormalises
            them. This makes the mixture sparse, not cheaper: every expert is
            computed.
        gate_units: sequence of ints, hidden layers of the gates. By default a gate
            is linear, as in the paper.
        gate_temperature: float > 0, the logits are divided by it: below 1 sharpens
            the gates, above 1 evens them out.
        gate_dropout: float in [0, 1), the probability with which a gate loses an
            expert during training. The weights that stay are renormalised, and a
            gate that would lose all keeps all. It works against gates that polarise
            on few experts (Zhao et al. 2019, section 4.4).
        experts: a layer that maps `(..., d)` to `(..., e, u)`, instead of the
            default `MLPExperts`. The arguments that describe experts (from
            `activation` to `kernel_regularizer`) then have no effect.
        activation: activation of every expert layer, the last one included.
        dropout: float in [0, 1), dropped share of an expert's hidden units.
        kernel_initializer: initializer of one expert's kernel.
        kernel_regularizer: regularizer of the stacked expert kernels.
        gate_use_bias: bool, whether the gate layers add a bias.
        gate_kernel_initializer: initializer of one gate's kernel.
        seed: int, the seed of both kinds of dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        gate_inputs: tensor of shape `(..., g)` with the leading axes of `inputs`,
            what the gates see. `inputs` by default.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument breaks its rule, if the leading axes of
            `gate_inputs` are not those of `inputs`, or if `experts` gives outputs of
            another shape.

    Example:

    >>> mmoe = keras_moe.layers.MMoE(4, (32, 16), tasks=["click", "buy"])
    >>> outputs = mmoe(np.ones((2, 8)))
    >>> sorted(outputs), outputs["buy"].shape == (2, 16)
    (['buy', 'click'], True)

    The gates are computed in float32 under any dtype policy and cast back once.

    References:
        - [Ma et al., 2018: Modeling Task Relationships in Multi-task Learning with
          Multi-gate Mixture-of-Experts](https://doi.org/10.1145/3219819.3220007)
        - [Zhao et al., 2019: Recommending What Video to Watch Next: A Multitask
          Ranking System](https://doi.org/10.1145/3298689.3346997)
    """

    def __init__(
        self,
        num_experts: int,
        expert_units: int | Sequence[int] | None,
        tasks: int | Sequence[str],
        *,
        top_k: int | None = None,
        gate_units: int | Sequence[int] = (),
        gate_temperature: float = 1.0,
        gate_dropout: float = 0.0,
        experts: keras.layers.Layer | None = None,
        activation: Any = "relu",
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        gate_use_bias: bool = False,
        gate_kernel_initializer: Any = "glorot_uniform",
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name or default_name("mmoe"), **kwargs)
        self.supports_masking = True
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.expert_units = expert_units
        self.tasks = Tasks(tasks)
        self.top_k = _checked_top_k(top_k, self.num_experts)
        self.gate_units = _checks.unit_sizes("gate_units", gate_units, allow_empty=True)
        self.gate_temperature = _checks.positive_number(
            "gate_temperature", gate_temperature
        )
        self.gate_dropout = _checks.rate("gate_dropout", gate_dropout)
        self.activation = keras.activations.get(activation)
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.gate_use_bias = gate_use_bias
        self.gate_kernel_initializer = keras.initializers.get(gate_kernel_initializer)
        self.seed = seed
        self._experts_given = experts is not None
        _check_experts(experts, self.num_experts, expert_units)
        self.experts = self._make_experts() if experts is None else experts
        self.gates = MLPExperts(
            self.tasks.count,
            (*self.gate_units, self.num_experts),
            use_bias=gate_use_bias,
            kernel_initializer=self.gate_kernel_initializer,
            dtype="float64" if self.compute_dtype == "float64" else "float32",
            name="gates",
        )
        if self.gate_dropout > 0.0:
            # Not the stream of the experts' dropout, which has the same seed.
            self.seed_generator = keras.random.SeedGenerator(
                None if seed is None else seed + 1
            )

    def _make_experts(self) -> MLPExperts:
        return MLPExperts(
            self.num_experts,
            _checks.unit_sizes("expert_units", self.expert_units),
            self.activation,
            final_activation=self.activation,
            dropout=self.dropout,
            kernel_initializer=self.kernel_initializer,
            kernel_regularizer=self.kernel_regularizer,
            seed=self.seed,
            dtype=self.dtype_policy,
            name="experts",
        )

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        gate_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        _check_gate_inputs(inputs_shape, gate_inputs_shape)
        # A symbolic call builds experts of any kind, unless they are built already.
        symbolic = self.experts(keras.KerasTensor(inputs_shape, self.compute_dtype))
        _check_expert_outputs(symbolic, (*inputs_shape[:-1], self.num_experts))
        self.gates.build(gate_inputs_shape or inputs_shape)

    def call(
        self, inputs: Any, gate_inputs: Any = None, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        gate_inputs = inputs if gate_inputs is None else gate_inputs
        _check_gate_inputs(inputs.shape, gate_inputs.shape)
        gates = self._gate(gate_inputs, training)  # (..., t, e)
        expert_outputs = self.experts(inputs, training=training)  # (..., e, u)
        mixtures = ops.matmul(
            ops.cast(gates, self.compute_dtype),
            ops.cast(expert_outputs, self.compute_dtype),
        )
        return self.tasks.pack(ops.unstack(mixtures, axis=-2))

    def gate_weights(self, inputs: Any, gate_inputs: Any = None) -> Any:
        """Return the gates in inference, `(..., t, e)`; each row sums to 1."""
        inputs = ops.convert_to_tensor(inputs if gate_inputs is None else gate_inputs)
        return self._gate(inputs, training=False)

    def _gate(self, inputs: Any, training: bool | None) -> Any:
        logits = self.gates(inputs) / self.gate_temperature
        if self.num_experts == 1:
            return ops.ones_like(logits)  # Keras warns of a softmax over one value.
        if training and self.gate_dropout > 0.0:
            logits = self._drop_experts(logits)
        if self.top_k is not None:
            _, chosen = ops.top_k(logits, self.top_k)
            kept = ops.sum(ops.one_hot(chosen, self.num_experts), axis=-2)
            logits = ops.where(kept > 0, logits, -float("inf"))
        return ops.softmax(logits, axis=-1)

    def _drop_experts(self, logits: Any) -> Any:
        """Removing a logit before the softmax renormalises what stays."""
        draw = keras.random.uniform(ops.shape(logits), seed=self.seed_generator)
        kept = draw >= self.gate_dropout
        kept = ops.logical_or(kept, ops.logical_not(ops.any(kept, -1, keepdims=True)))
        return ops.where(kept, logits, -float("inf"))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return None if mask is None else self.tasks.repeat(mask)

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        gate_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> Any:
        inputs = keras.KerasTensor(inputs_shape, self.compute_dtype)
        *leading, _, units = self.experts.compute_output_spec(inputs).shape
        return self.tasks.repeat((*leading, units))

    def get_config(self) -> dict[str, Any]:
        experts = keras.saving.serialize_keras_object(self.experts)
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "expert_units": self.expert_units,
            "tasks": self.tasks.config,
            "top_k": self.top_k,
            "gate_units": self.gate_units,
            "gate_temperature": self.gate_temperature,
            "gate_dropout": self.gate_dropout,
            "experts": experts if self._experts_given else None,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "gate_use_bias": self.gate_use_bias,
            "gate_kernel_initializer": keras.initializers.serialize(
                self.gate_kernel_initializer
            ),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MMoE:
        experts = config.get("experts")
        if isinstance(experts, dict):
            experts = keras.saving.deserialize_keras_object(experts)
        return cls(**{**config, "experts": experts})


def _checked_top_k(top_k: int | None, num_experts: int) -> int | None:
    if top_k is None:
        return None
    if _checks.positive_int("top_k", top_k) > num_experts:
        raise ValueError(
            "`top_k` must not exceed `num_experts`. "
            f"Received: top_k={top_k}, num_experts={num_experts}"
        )
    return top_k


def _check_experts(experts: Any, num_experts: int, expert_units: Any) -> None:
    if experts is None:
        return
    if not isinstance(experts, keras.layers.Layer):
        raise ValueError(f"`experts` must be a Keras layer. Received: {experts!r}")
    if expert_units is not None:
        raise ValueError(
            "`expert_units` must be None where `experts` is given, which has its own. "
            f"Received: expert_units={expert_units!r}"
        )
    if getattr(experts, "num_experts", num_experts) != num_experts:
        raise ValueError(
            "`num_experts` must be the number of experts in `experts`. Received: "
            f"num_experts={num_experts}, experts.num_experts={experts.num_experts}"
        )


def _check_expert_outputs(symbolic: Any, expected: tuple[int | None, ...]) -> None:
    shape: tuple[int | None, ...] = getattr(symbolic, "shape", ())
    if len(shape) != len(expected) + 1 or shape[-2] != expected[-1]:
        raise ValueError(
            "`experts` must map (..., d) to (..., e, u). Received: experts whose "
            f"outputs have the shape {tuple(shape)} instead of {(*expected, 'u')}"
        )


def _check_gate_inputs(
    inputs_shape: tuple[int | None, ...],
    gate_inputs_shape: tuple[int | None, ...] | None,
) -> None:
    if gate_inputs_shape is None:
        return
    leading, gate_leading = inputs_shape[:-1], gate_inputs_shape[:-1]
    same = len(leading) == len(gate_leading) and all(
        a is None or b is None or a == b
        for a, b in zip(leading, gate_leading, strict=True)
    )
    if not same:
        raise ValueError(
            "`gate_inputs` must have the leading axes of `inputs`. Received: inputs of "
            f"shape {tuple(inputs_shape)}, gate_inputs of shape "
            f"{tuple(gate_inputs_shape)}"
        )


@keras.saving.register_keras_serializable("keras_moe")
class SharedBottom(keras.layers.Layer):
    """One MLP whose output every task shares: the classical multi-task baseline.

    Its outputs have the form of those of `MMoE`, so that one swaps for the other in
    a line.

    Args:
        units: int or sequence of ints, the widths of the layers.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        activation: activation of every layer, the last one included.
        dropout: float in [0, 1), dropped share of every hidden layer's units.
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
        ValueError: if an argument breaks its rule.

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
        *,
        activation: Any = "relu",
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.tasks = Tasks(tasks)
        # A shared bottom is a mixture of one expert, whose gate is always 1.
        self.bottom = MLPExperts(
            1,
            _checks.unit_sizes("units", units),
            activation,
            final_activation=activation,
            dropout=dropout,
            kernel_initializer=kernel_initializer,
            kernel_regularizer=kernel_regularizer,
            seed=seed,
            dtype=self.dtype_policy,
            name="bottom",
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.bottom.build(input_shape)

    def call(
        self, inputs: Any, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        outputs = ops.squeeze(self.bottom(inputs, training=training), axis=-2)
        return self.tasks.repeat(outputs)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return None if mask is None else self.tasks.repeat(mask)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> Any:
        return self.tasks.repeat((*input_shape[:-1], self.bottom.units[-1]))

    def get_config(self) -> dict[str, Any]:
        bottom = self.bottom.get_config()
        kept = (
            "units",
            "activation",
            "dropout",
            "kernel_initializer",
            "kernel_regularizer",
            "seed",
        )
        return {
            **super().get_config(),
            "tasks": self.tasks.config,
            **{name: bottom[name] for name in kept},
        }
