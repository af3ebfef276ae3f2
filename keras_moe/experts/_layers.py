"""Experts that are Keras layers of any kind.

Axis letters: n rows, d input features, e experts, u output units, c slots per expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe._layer import Layer


@keras.saving.register_keras_serializable("keras_moe")
class LayerExperts(Layer):
    """Experts that are arbitrary Keras layers or models, not necessarily of one type.

    Experts are computed one by one, which is slower than the stacked `MLPExperts`. The
    dispatches "blocked" and "ragged" need stacked kernels and are not supported. Layers
    may be called with an empty batch.

    Args:
        layers: sequence of distinct Keras layers that map `(rows, d)` to `(rows, u)`,
            with the same u.

    Call arguments:
        inputs: tensor of shape `(..., d)`; every expert computes every row.

    Returns:
        A tensor of shape `(..., e, u)`.

    Raises:
        ValueError: if `layers` is empty, has an item that is not a layer or a repeated
            layer, or if the output widths differ.

    Example:

    >>> narrow = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(8)])
    >>> experts = keras_moe.experts.LayerExperts([keras.layers.Dense(8), narrow])
    >>> experts(np.ones((2, 16))).shape == (2, 2, 8)
    True
    """

    def __init__(self, layers: Iterable[keras.layers.Layer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        if isinstance(layers, keras.layers.Layer):
            layers = [layers]
        rule = "a sequence of at least one Keras layer"
        layers = list(_checks.items("layers", layers, rule))
        if not layers or not all(isinstance(x, keras.layers.Layer) for x in layers):
            raise ValueError(
                "`layers` must be a sequence of at least one Keras layer. "
                f"Received: layers={layers!r}"
            )
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                "`layers` must be distinct layers, one per expert. Received a repeated "
                f"layer in layers={layers!r}"
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
                "`layers` must map (rows, d) to (rows, u) with the same u. "
                f"Received: layers with output shapes {shapes}"
            )

    def call(self, inputs: Any) -> Any:
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        # The layers' dtypes may differ.
        outputs = [ops.cast(layer(rows), self.compute_dtype) for layer in self.layers]
        outputs = ops.stack(outputs, axis=1)
        return ops.reshape(
            outputs,
            (*_backend.restored_axes(leading), self.num_experts, outputs.shape[-1]),
        )

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u): each expert on its own slots."""
        pieces = ops.unstack(slots, num=self.num_experts)
        return ops.stack(self.on_pieces(pieces, training), axis=0)

    def on_pieces(
        self, pieces: Sequence[Any], training: bool | None = None
    ) -> list[Any]:
        """Return (rows, u) for each (rows, d) of `pieces`, one piece per expert."""
        # Keras propagates `training` to nested layers.
        return [layer(piece) for layer, piece in zip(self.layers, pieces, strict=True)]

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        # A symbolic call, because not all layers implement `compute_output_shape`.
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
