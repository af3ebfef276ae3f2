"""Experts: the networks that a gate or a router chooses between.

Axis letters: n rows, d input features, e experts, h hidden units, u output units,
c slots an expert.

Where the experts of a layer share one shape, their weights are kept as one tensor with
the experts on the first axis. Every step is then one large matmul, not e small ones.

A gate calls experts as a layer, every expert on every row. A dispatch, which has sorted
the rows by expert, calls one of three methods:

- `on_pieces`: a list of e tensors `(rows of expert k, d)`.
- `on_slots`: one tensor `(e, c, d)`.
- `on_rows`: rows in a layout that only the dispatch knows. It hands over its own
  `matmul(rows, kernel, bias, before)`, which multiplies every row by its own expert's
  kernel. `before` is applied to the rows first (a function of as many tensors as `rows`
  holds); it is given along so that a dispatch may compute it block by block. Experts
  whose weights are not stacked do not have this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._layer import Layer
from keras_moe.initializers import PerExpert


class _StackedExperts(Layer):
    """Experts whose formula `on_rows` is the same for every one of them."""

    num_experts: int
    on_rows: Callable[..., Any]

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): every expert on its own slots."""

        def matmul(rows: Any, kernel: Any, bias: Any = None, before: Any = None) -> Any:
            rows = ops.matmul(_before(before, rows), kernel)
            return rows if bias is None else rows + ops.expand_dims(bias, 1)

        return self.on_rows(slots, matmul, training=training)

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one an expert."""
        parts: dict[int, Sequence[Any]] = {}

        def part(stacked: Any, k: int) -> Any:
            # Unstacked once: the gradient of `stacked[k]` would be as large as all.
            if id(stacked) not in parts:
                tensor = ops.convert_to_tensor(stacked)
                parts[id(stacked)] = ops.unstack(tensor, num=self.num_experts)
            return parts[id(stacked)][k]

        def matmul_of(k: int) -> Callable[..., Any]:
            def matmul(
                rows: Any, kernel: Any, bias: Any = None, before: Any = None
            ) -> Any:
                rows = ops.matmul(_before(before, rows), part(kernel, k))
                # `ops.add` lets TensorFlow fuse the bias into the matmul, `+` does not.
                return rows if bias is None else ops.add(rows, part(bias, k))

            return matmul

        return [
            self.on_rows(rows, matmul_of(k), training=training)
            for k, rows in enumerate(pieces)
        ]


def restored_axes(leading: Sequence[Any]) -> tuple[Any, ...]:
    """Return the leading axes for a reshape, which can infer one: the batch.

    A batch that is known is not inferred, because nothing can be told from no rows.
    """
    return (leading[0] if isinstance(leading[0], int) else -1, *leading[1:])


def _before(before: Callable[..., Any] | None, rows: Any) -> Any:
    """Return `before(*rows)` for rows that are one tensor or a tuple of them."""
    if before is None:
        return rows
    return before(*rows) if isinstance(rows, tuple) else before(rows)


def _function(argument: str, activation: Any) -> Callable[..., Any]:
    """Return an activation that holds no weights: experts would all share them."""
    if isinstance(activation, keras.layers.Layer):
        raise ValueError(
            f"`{argument}` must be the name of an activation or a function, not a "
            f"layer. Received: {argument}={activation!r}"
        )
    return keras.activations.get(activation)


@keras.saving.register_keras_serializable("keras_moe")
class MLPExperts(_StackedExperts):
    """e multi-layer perceptrons of one shape, computed together.

    Args:
        num_experts: int, number of experts e.
        units: int or sequence of ints, the width of every layer of an expert; the
            last one is the output width u.
        activation: activation of the hidden layers.
        use_bias: bool, whether every layer adds a bias.
        final_activation: activation of the last layer. Linear by default.
        dropout: float in [0, 1), dropped share of every hidden layer's units.
        kernel_initializer: initializer of one expert's kernel; each expert and each
            layer gets its own draw (see `keras_moe.initializers.PerExpert`).
        bias_initializer: initializer of the biases.
        kernel_regularizer: regularizer of every stacked kernel.
        bias_regularizer: regularizer of every stacked bias.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`: every expert sees every row.
        training: bool, whether dropout is active.

    Returns:
        A tensor of shape `(..., e, u)`.

    Attributes:
        kernels: one variable a layer, of shape `(e, in, out)`.
        biases: one variable a layer, of shape `(e, out)`; empty without bias.

    Raises:
        ValueError: if an argument breaks its rule, or the last axis of the inputs is
            not known.

    Example:

    >>> experts = keras_moe.experts.MLPExperts(num_experts=4, units=(32, 8))
    >>> outputs = experts(np.ones((2, 16)))
    >>> outputs.shape == (2, 4, 8), experts.kernels[1].shape == (4, 32, 8)
    (True, True)

    References:
        - [Jacobs et al., 1991: Adaptive Mixtures of Local Experts](
          https://doi.org/10.1162/neco.1991.3.1.79)
    """

    def __init__(
        self,
        num_experts: int,
        units: int | Sequence[int],
        activation: Any = "relu",
        use_bias: bool = True,
        *,
        final_activation: Any = None,
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
        self.units = _checks.unit_sizes("units", units)
        self.activation = _function("activation", activation)
        self.use_bias = use_bias
        self.final_activation = _function("final_activation", final_activation)
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.seed = seed
        if self.dropout > 0.0:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.kernels: list[Any] = []
        self.biases: list[Any] = []

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        # Without it, inputs of another width could fit the reshapes below by chance.
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        for i, units in enumerate(self.units):
            self.kernels.append(
                self.add_weight(
                    name=f"kernel_{i}",
                    shape=(self.num_experts, features, units),
                    initializer=PerExpert(self.kernel_initializer, stream=i),
                    regularizer=self.kernel_regularizer,
                )
            )
            if self.use_bias:
                self.biases.append(
                    self.add_weight(
                        name=f"bias_{i}",
                        shape=(self.num_experts, units),
                        initializer=PerExpert(
                            self.bias_initializer, stream=len(self.units) + i
                        ),
                        regularizer=self.bias_regularizer,
                    )
                )
            features = units

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        outputs = self._first_layer(rows, training)
        if len(self.units) > 1:
            outputs = ops.transpose(outputs, (1, 0, 2))  # (e, n, h)
            for i in range(1, len(self.units)):
                outputs = self._later_layer(i, outputs, training)
            outputs = ops.transpose(outputs, (1, 0, 2))  # (n, e, u)
        # One unknown axis is all that a reshape can infer, hence -1 for the batch.
        return ops.reshape(
            outputs, (*restored_axes(leading), self.num_experts, self.units[-1])
        )

    def on_rows(
        self, rows: Any, matmul: Callable[..., Any], training: bool | None = None
    ) -> Any:
        """The formula of one expert, on rows that `matmul` understands."""
        before = None
        for i, kernel in enumerate(self.kernels):
            rows = matmul(rows, kernel, self.biases[i] if self.biases else None, before)
            before = self.activation
            if training and self.dropout > 0.0 and i < len(self.units) - 1:
                rows, before = self._activate(i, rows, training), None
        return self.final_activation(rows)

    def _first_layer(self, rows: Any, training: bool | None) -> Any:
        """(n, d) -> (n, e, h): the experts share the rows, so one matmul does all."""
        kernel = ops.transpose(self.kernels[0], (1, 0, 2))  # (d, e, h)
        outputs = ops.matmul(rows, ops.reshape(kernel, (rows.shape[-1], -1)))
        outputs = ops.reshape(outputs, (-1, self.num_experts, self.units[0]))
        if self.use_bias:
            outputs = outputs + ops.convert_to_tensor(self.biases[0])
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
            "num_experts": self.num_experts,
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "final_activation": keras.activations.serialize(self.final_activation),
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable("keras_moe")
class GLUExperts(_StackedExperts):
    """e gated linear units of one shape: y = (activation(x G) * (x U)) D.

    With the activation "silu" this is SwiGLU, with "gelu" GEGLU, with "sigmoid" GLU.

    Args:
        num_experts: int, number of experts e.
        hidden_units: int, the width h of the product.
        units: int, the output width u. The width of the inputs by default.
        activation: activation of the gate.
        use_bias: bool, whether each of the three matmuls adds a bias.
        dropout: float in [0, 1), dropped share of the hidden units.
        kernel_initializer: initializer of one expert's kernel; each expert and each
            of the three kernels gets its own draw.
        bias_initializer: initializer of the biases.
        kernel_regularizer: regularizer of every stacked kernel.
        bias_regularizer: regularizer of every stacked bias.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`: every expert sees every row.
        training: bool, whether dropout is active.

    Returns:
        A tensor of shape `(..., e, u)`.

    Attributes:
        gate_kernel: G, variable of shape `(e, d, h)`.
        up_kernel: U, variable of shape `(e, d, h)`.
        down_kernel: D, variable of shape `(e, h, u)`.

    Raises:
        ValueError: if an argument breaks its rule, or the last axis of the inputs is
            not known.

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
        self.activation = _function("activation", activation)
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
            outputs, (*restored_axes(leading), self.num_experts, outputs.shape[-1])
        )

    def on_rows(
        self, rows: Any, matmul: Callable[..., Any], training: bool | None = None
    ) -> Any:
        """The formula of one expert, on rows that `matmul` understands."""
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


@keras.saving.register_keras_serializable("keras_moe")
class LayerExperts(Layer):
    """Experts that are Keras layers or models of any kind, also of different kinds.

    Each is computed on its own, so that many of them cost more than the stacked
    `MLPExperts`, and the dispatches "blocked" and "ragged" cannot serve them. A layer
    may be called on no row at all.

    Args:
        layers: sequence of Keras layers that map `(rows, d)` to `(rows, u)`, u the
            same for all. No layer twice.

    Call arguments:
        inputs: tensor of shape `(..., d)`: every expert sees every row.

    Returns:
        A tensor of shape `(..., e, u)`.

    Raises:
        ValueError: if `layers` is empty, holds something else than layers or one of
            them twice, or if their outputs differ in width.

    Example:

    >>> narrow = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(8)])
    >>> experts = keras_moe.experts.LayerExperts([keras.layers.Dense(8), narrow])
    >>> experts(np.ones((2, 16))).shape == (2, 2, 8)
    True
    """

    def __init__(self, layers: Sequence[keras.layers.Layer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        layers = list(layers) if isinstance(layers, list | tuple) else [layers]
        if not layers or not all(isinstance(x, keras.layers.Layer) for x in layers):
            raise ValueError(
                "`layers` must be a sequence of at least one Keras layer. "
                f"Received: layers={layers!r}"
            )
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                "every expert in `layers` must be a layer of its own. Received one "
                f"layer twice in layers={layers!r}"
            )
        self.layers = layers
        self.num_experts = len(layers)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        rows = keras.KerasTensor((None, features), self.compute_dtype)
        shapes = [tuple(layer(rows).shape) for layer in self.layers]
        if len(set(shapes)) > 1 or len(shapes[0]) != 2:
            raise ValueError(
                "the experts in `layers` must map (rows, d) to (rows, u) with one u. "
                f"Received layers whose outputs have the shapes {shapes}"
            )

    def call(self, inputs: Any) -> Any:
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        # Layers of a dtype of their own are heard in that of this layer.
        outputs = [ops.cast(layer(rows), self.compute_dtype) for layer in self.layers]
        outputs = ops.stack(outputs, axis=1)
        return ops.reshape(
            outputs, (*restored_axes(leading), self.num_experts, outputs.shape[-1])
        )

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): every expert on its own slots."""
        pieces = ops.unstack(slots, num=self.num_experts)
        return ops.stack(self.on_pieces(pieces, training), axis=0)

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one an expert."""
        # Keras hands `training` down to layers inside a call.
        return [layer(piece) for layer, piece in zip(self.layers, pieces, strict=True)]

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        # A call, because not every layer can tell its output shape.
        rows = keras.KerasTensor((None, input_shape[-1]), self.compute_dtype)
        units = self.layers[0](rows).shape[-1]
        return (*input_shape[:-1], self.num_experts, units)

    def get_config(self) -> dict[str, Any]:
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.layers]
        return {**super().get_config(), "layers": layers}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerExperts:
        layers = [
            keras.saving.deserialize_keras_object(layer)
            if isinstance(layer, dict)
            else layer
            for layer in config["layers"]
        ]
        return cls(**{**config, "layers": layers})
