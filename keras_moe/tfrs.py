"""Keras 3 layers in a Keras 2 model such as `tfrs.Model`.

tensorflow-recommenders runs on Keras 2 (the package tf_keras), this library on Keras 3.
Both use the same TensorFlow variables and tensors. `LegacyLayer` adapts what differs:
weights, losses, masks, the training flag, dtypes, freezing and saving.

Import this module before any use of `tf.keras`: it sets TF_USE_LEGACY_KERAS, which
TensorFlow reads once.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import keras
import tensorflow as tf


def _import_keras_2() -> Any:
    """Return tf_keras; raise ImportError unless `tf.keras` is tf_keras too."""
    if keras.backend.backend() != "tensorflow":
        raise ImportError(
            "keras_moe.tfrs needs KERAS_BACKEND=tensorflow; "
            f"the backend is {keras.backend.backend()}"
        )
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    try:
        import tf_keras
    except ImportError as error:
        raise ImportError(
            "keras_moe.tfrs needs tf_keras and tensorflow-recommenders: "
            "pip install tensorflow-recommenders tf_keras"
        ) from error
    version = tf.keras.version() if hasattr(tf.keras, "version") else "2"
    if not version.startswith("2"):
        raise ImportError(
            "keras_moe.tfrs needs tf.keras to be Keras 2, but it is already Keras "
            f"{version}: set TF_USE_LEGACY_KERAS=1 before Python starts, or import "
            "keras_moe.tfrs first"
        )
    return tf_keras


tf_keras: Any = _import_keras_2()


@tf_keras.saving.register_keras_serializable("keras_moe")
class LegacyLayer(tf_keras.layers.Layer):
    """Wraps a Keras 3 layer or model as a Keras 2 layer (tf_keras).

    Its weights are the weights of `layer`. They can be trained, frozen and saved like
    those of any Keras 2 layer: by `tf.train.Checkpoint`, `save_weights`, `model.save`
    and `tf.saved_model.save`. Its losses are added to the model's `losses`.

    Args:
        layer: a Keras 3 layer or model. It is wrapped, not copied.
        name: str, the name of this layer. Default: `layer.name`.
        **kwargs: further arguments of a Keras 2 layer, except `dtype`: `layer` has its
            own dtype policy.

    Call arguments:
        inputs: first argument of `layer`.
        *args: further positional arguments of `layer`.
        training: bool, passed to `layer` if it has this argument.
        mask: passed to `layer` if it has this argument.
        **kwargs: further arguments of `layer`.

    Returns:
        The outputs of `layer`.

    Raises:
        ValueError: if `layer` is not a Keras 3 layer, or `dtype` is given.

    Example:

    >>> mmoe = keras_moe.layers.MMoE(4, 16, tasks=["click", "buy"])
    >>> inputs = tf.keras.Input((8,))
    >>> outputs = keras_moe.tfrs.LegacyLayer(mmoe)(inputs)
    >>> tf.keras.Model(inputs, outputs).output_shape["buy"]
    (None, 16)

    With several replicas, call the model once on a few rows within `strategy.scope()`
    before training.
    """

    def __init__(self, layer: Any, name: str | None = None, **kwargs: Any) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "`layer` must be a Keras 3 layer or model; Keras 2 layers need no "
                f"LegacyLayer. Received: layer={layer!r}"
            )
        if kwargs.pop("dtype", None) is not None:
            raise ValueError(
                "`dtype` must not be given: the layer has its own dtype policy, "
                f"{layer.dtype_policy.name}"
            )
        # `layer` casts its inputs itself.
        kwargs = {"trainable": layer.trainable, **kwargs, "autocast": False}
        super().__init__(name=name or layer.name, dtype=_policy(layer), **kwargs)
        # Bypasses the tracking of Keras 2, which would save Keras 3 objects but not
        # restore them; `_track` sets what is saved.
        object.__setattr__(self, "layer", layer)
        self._trainable = kwargs["trainable"]
        self.supports_masking = layer.supports_masking
        takes = inspect.signature(layer.call).parameters
        self._passed_arguments = [k for k in ("training", "mask") if k in takes]
        if layer.built:
            self._track()
        # A callable is evaluated once per access to `losses`, not once per call.
        self.add_loss(self._regularization)

    # Keras 2 sets this attribute on every layer of a frozen model.
    @property
    def _trainable(self) -> bool:
        layer = self.__dict__.get("layer")
        return True if layer is None else layer.trainable

    @_trainable.setter
    def _trainable(self, value: bool) -> None:
        layer = self.__dict__.get("layer")
        if layer is not None and layer.trainable != value:
            layer.trainable = value

    @property
    def trainable_weights(self) -> list[Any]:
        return [variable.value for variable in self.layer.trainable_variables]

    @property
    def non_trainable_weights(self) -> list[Any]:
        # Includes the state of metrics and seed generators, which a call changes.
        return [variable.value for variable in self.layer.non_trainable_variables]

    def call(
        self,
        inputs: Any,
        *args: Any,
        training: bool | None = None,
        mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self.layer.built:
            self._check_may_build()
            # Symbolic, so a deferred checkpoint restore happens before the first
            # outputs are computed.
            shapes = keras.tree.map_structure(_symbolic, ((inputs, *args), kwargs))
            self.layer(*shapes[0], **shapes[1])
            self._track()
        given = {"training": training, "mask": mask}
        for name in self._passed_arguments:
            if given[name] is not None:
                kwargs[name] = given[name]
        # Keras 3 clears losses in its training loop, which is not used here.
        self.layer._clear_losses()
        outputs = self.layer(inputs, *args, **kwargs)
        losses = self.layer.losses
        self.add_loss(losses[: len(losses) - len(self._regularized())])
        return outputs

    def _check_may_build(self) -> None:
        """Raise ValueError in a replica, where variables cannot be initialized."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1 and not tf.distribute.in_cross_replica_context():
            raise ValueError(
                f"the weights of {self.name!r} must exist before training on "
                f"{replicas} replicas: call the model once on a few rows within "
                "`strategy.scope()`"
            )

    def _track(self) -> None:
        """Track weights and lookup tables for checkpoints and SavedModels."""
        self._held_variables = [variable.value for variable in self.layer.variables]
        self._held_tables = [
            value
            for layer in [self.layer, *self.layer._flatten_layers(include_self=False)]
            for value in vars(layer).values()
            if isinstance(value, tf.saved_model.experimental.TrackableResource)
        ]

    def _regularized(self) -> list[Any]:
        variables = self.layer.trainable_variables
        return [v for v in variables if v.regularizer is not None]

    def _regularization(self) -> Any:
        """Return the sum of the regularization losses, 0 if there are none."""
        return sum((v.regularizer(v) for v in self._regularized()), start=tf.zeros(()))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, mask) if self.supports_masking else None

    def compute_output_shape(self, input_shape: Any) -> Any:
        if isinstance(input_shape, tf.TensorShape):
            input_shape = tuple(input_shape.as_list())
        found = self.layer.compute_output_shape(input_shape)
        return keras.tree.map_shape_structure(tf.TensorShape, found)

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(self.layer.variables):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        # In the layer's order, which does not depend on frozen weights.
        variables = self.layer.variables
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"the file holds {len(store.keys())} weights for {self.name!r}, which "
                f"has {len(variables)}. Call the layer once before loading weights, to "
                "build it"
            )
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["dtype"]
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**config, "layer": layer}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LegacyLayer:
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def _policy(layer: keras.layers.Layer) -> Any:
    """Return the Keras 2 policy with the dtypes of a Keras 3 layer."""
    compute, variables = layer.compute_dtype, layer.variable_dtype
    mixed = compute != variables == "float32" and compute in ("float16", "bfloat16")
    return tf_keras.mixed_precision.Policy(f"mixed_{compute}" if mixed else compute)


def _symbolic(value: Any) -> Any:
    """Return a symbolic tensor of the same shape and dtype; other values unchanged."""
    if not tf.is_tensor(value):
        return value
    return keras.KerasTensor(value.shape, value.dtype.name)
