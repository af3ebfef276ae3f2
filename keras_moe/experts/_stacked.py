"""Layers with stacked kernels: common arguments, and calls implemented by `on_rows`.

Axis letters: e experts, d input features, u output units, c slots per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe._layer import Layer
from keras_moe.experts._protocol import GroupedMatmul, Prologue, apply_prologue
from keras_moe.initializers import PerExpert


class StackedKernels(Layer):
    """The base class of layers with stacked kernels, such as experts of your own.

    A subclass defines `build`, `call` (every expert on every row), `on_rows` and
    `compute_output_shape`; `on_slots` and `on_pieces` use `on_rows`. It then implements
    the protocol `GroupedExperts`, which every dispatch supports.

    Args:
        num_experts: int, number of experts e.
        **kwargs: arguments of `keras.layers.Layer`, such as `dtype` and `name`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> class LinearExperts(keras_moe.experts.StackedKernels):
    ...     def build(self, input_shape):
    ...         self.kernel = self.add_weight(
    ...             name="kernel", shape=(self.num_experts, input_shape[-1], 8)
    ...         )
    ...
    ...     def call(self, inputs):
    ...         return keras.ops.einsum("nd,edu->neu", inputs, self.kernel)
    ...
    ...     def on_rows(self, rows, matmul, training=None):
    ...         return matmul(rows, self.kernel)
    >>> moe = keras_moe.layers.MoE(experts=LinearExperts(num_experts=4))
    >>> moe(np.ones((3, 16))).shape == (3, 8)
    True
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_experts = _checks.positive_int("num_experts", num_experts)

    @property
    def fast_in_turn(self) -> bool:
        """Whether one matmul per expert is faster than one for all, in this graph.

        `on_slots`, and mixtures with several streams, then call `on_pieces`.
        """
        return False

    def on_rows(
        self, rows: Any, matmul: GroupedMatmul, training: bool | None = None
    ) -> Any:
        """(m, d) -> (m, u): one expert per row, with `matmul` for all matmuls."""
        raise NotImplementedError(f"{type(self).__name__} must define `on_rows`.")

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): each expert on its own slots."""
        if self.fast_in_turn:
            pieces = ops.unstack(slots, num=self.num_experts)
            return ops.stack(self.on_pieces(pieces, training=training))

        def matmul(
            rows: Any, kernel: Any, bias: Any = None, prologue: Prologue | None = None
        ) -> Any:
            rows = ops.matmul(apply_prologue(prologue, rows), kernel)
            return rows if bias is None else rows + ops.expand_dims(bias, 1)

        return self.on_rows(slots, matmul, training=training)

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one piece per expert."""
        parts: dict[int, tuple[Any, Sequence[Any]]] = {}

        def part(stacked: Any, k: int) -> Any:
            # Unstacked once: each gradient of `stacked[k]` would have the full size.
            if id(stacked) not in parts:
                tensor = ops.convert_to_tensor(stacked)
                # With `stacked` itself, whose id would else be free for another one.
                pieces = ops.unstack(tensor, num=self.num_experts)
                parts[id(stacked)] = stacked, pieces
            return parts[id(stacked)][1][k]

        def matmul_of(k: int) -> GroupedMatmul:
            def matmul(
                rows: Any,
                kernel: Any,
                bias: Any = None,
                prologue: Prologue | None = None,
            ) -> Any:
                rows = ops.matmul(apply_prologue(prologue, rows), part(kernel, k))
                # `ops.add` lets TensorFlow fuse the bias into the matmul, `+` does not.
                return rows if bias is None else ops.add(rows, part(bias, k))

            return matmul

        return [
            self.on_rows(rows, matmul_of(k), training=training)
            for k, rows in enumerate(pieces)
        ]

    def in_turn(self, inputs: Any, training: bool | None = None) -> Any:
        """(..., d) -> (..., e, u): every expert on every row, one expert at a time."""
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        outputs = self.on_pieces([rows] * self.num_experts, training=training)
        return beside(outputs, leading)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_experts": self.num_experts}


class StackedDense(StackedKernels):
    """A layer with stacked kernels whose matmuls add a bias: arguments and weights.

    A subclass sets `num_matmuls`.
    """

    num_matmuls: int

    def __init__(
        self,
        num_experts: int,
        activation: Any,
        use_bias: bool,
        *,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, **kwargs)
        self.activation = activation_function("activation", activation)
        self.use_bias = _checks.flag("use_bias", use_bias)
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = _checks.initializer(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = _checks.initializer(
            "bias_initializer", bias_initializer
        )
        self.kernel_regularizer = _checks.regularizer(
            "kernel_regularizer", kernel_regularizer
        )
        self.bias_regularizer = _checks.regularizer(
            "bias_regularizer", bias_regularizer
        )
        self.seed = _checks.seed(seed)
        if self.dropout > 0.0:
            self.seed_generator = keras.random.SeedGenerator(self.seed)

    @property
    def fast_in_turn(self) -> bool:
        return _backend.fuses_dense()

    def _add_dense(
        self, i: int, features: int, units: int, kernel: str, bias: str
    ) -> tuple[Any, Any]:
        """Add the kernel (e, in, out) and the bias (e, out), or None, of matmul i."""
        # A different stream per weight: with one seed, kernel and bias would otherwise
        # start with equal values.
        stacked_kernel = self.add_weight(
            name=kernel,
            shape=(self.num_experts, features, units),
            initializer=PerExpert(self.kernel_initializer, stream=i),
            regularizer=self.kernel_regularizer,
            autocast=self.autocast,
        )
        if not self.use_bias:
            return stacked_kernel, None
        stacked_bias = self.add_weight(
            name=bias,
            shape=(self.num_experts, units),
            initializer=PerExpert(self.bias_initializer, stream=self.num_matmuls + i),
            regularizer=self.bias_regularizer,
            autocast=self.autocast,
        )
        return stacked_kernel, stacked_bias

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "seed": self.seed,
        }


def beside(outputs: Sequence[Any], leading: Sequence[Any]) -> Any:
    """Return `outputs`, one (n, u) per expert, as (..., e, u)."""
    e, u = len(outputs), outputs[0].shape[-1]
    # Along the features, each row is one copy of e * u values.
    rows = outputs[0] if e == 1 else ops.concatenate(outputs, axis=-1)
    return ops.reshape(rows, (*_backend.restored_axes(leading), e, u))


def activation_function(argument: str, activation: Any) -> Callable[..., Any]:
    """Return an activation function; layers are invalid (experts would share one)."""
    return _checks.activation(argument, activation)
