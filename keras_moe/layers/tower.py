"""The head of one task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import _checks
from keras_moe.initializers import independent
from keras_moe.layers._parts import Adaptable


@keras.saving.register_keras_serializable("keras_moe")
class Tower(Adaptable):
    """A task head: an MLP that ends in one output unit, or a few.

    Args:
        units: int or sequence of ints, widths of the hidden layers; `()` for none.
        activation: activation of the output units: None for a logit or a
            regression, "sigmoid" for a probability.
        output_units: int, the number o of output units.
        hidden_activation: activation of the hidden layers.
        dropout: float in [0, 1), fraction of each hidden layer's units to drop.
        kernel_initializer: initializer of the kernels, drawn independently per layer.
        bias_initializer: initializer of the output unit's bias. A constant near the
            mean label (for a logit, its log odds) speeds up the first steps.
        kernel_regularizer: regularizer of the kernels.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`.
        training: bool, whether dropout is active.

    Returns:
        A tensor of shape `(..., o)`, in float32 even under a half-precision dtype
        policy, for accurate losses and metrics.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> tower = keras_moe.layers.Tower((16,), activation="sigmoid")
    >>> tower(np.ones((2, 8))).shape == (2, 1)
    True
    """

    def __init__(
        self,
        units: int | Sequence[int],
        activation: Any = None,
        *,
        output_units: int = 1,
        hidden_activation: Any = "relu",
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = _checks.unit_sizes("units", units, allow_empty=True)
        self.activation = _checks.activation("activation", activation, allow_layer=True)
        self.output_units = _checks.positive_int("output_units", output_units)
        is_layer = isinstance(hidden_activation, keras.layers.Layer)
        if is_layer and len(self.units) > 1:
            raise ValueError(
                "`hidden_activation` must be a name or a function if there are several "
                "hidden layers, which would share the weights of a layer. Received: "
                f"hidden_activation={hidden_activation!r}, units={self.units}"
            )
        self.hidden_activation = _checks.activation(
            "hidden_activation", hidden_activation, allow_layer=True
        )
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
        self.seed = seed = _checks.seed(seed)
        self.hidden = [
            self._dense(
                i,
                size,
                self.hidden_activation,
                dtype=self.dtype_policy,
                name=f"hidden_{i}",
            )
            for i, size in enumerate(self.units)
        ]
        self.dropouts = [
            keras.layers.Dropout(
                self.dropout,
                seed=_checks.next_seed(seed, i),
                dtype=self.dtype_policy,
                name=f"dropout_{i}",
            )
            for i in range(len(self.units))
        ]
        self.output_unit = self._dense(
            len(self.units),
            self.output_units,
            self.activation,
            bias_initializer=self.bias_initializer,
            dtype=self.precise_dtype,
            name="output_unit",
        )

    def _dense(
        self, i: int, units: int, activation: Any, **kwargs: Any
    ) -> keras.layers.Dense:
        return keras.layers.Dense(
            units,
            activation,
            kernel_initializer=independent(self.kernel_initializer, i),
            kernel_regularizer=self.kernel_regularizer,
            **kwargs,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        _checks.last_dimension(type(self).__name__, input_shape)
        for layer, dropout in zip(self.hidden, self.dropouts, strict=True):
            layer.build(input_shape)
            input_shape = layer.compute_output_shape(input_shape)
            dropout.build(input_shape)
        self.output_unit.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        outputs = inputs
        for layer, dropout in zip(self.hidden, self.dropouts, strict=True):
            outputs = dropout(layer(outputs), training=training)
        return self.output_unit(outputs)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.output_units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "output_units": self.output_units,
            "hidden_activation": keras.activations.serialize(self.hidden_activation),
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
        }
