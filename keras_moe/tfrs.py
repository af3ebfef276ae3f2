"""Keras 3 layers in a model of Keras 2, which every `tfrs.Model` is.

tensorflow-recommenders runs on Keras 2 (the package tf_keras), this library on Keras 3.
Both compute with the same TensorFlow variables and tensors, so a layer of one may work
inside the other, if somebody carries over what Keras itself looks after: weights,
losses, masks, the training flag, dtypes, what is frozen, and what is saved.

Import this module before anything uses `tf.keras`: it sets TF_USE_LEGACY_KERAS, which
TensorFlow reads once.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import keras
import tensorflow as tf


def _import_keras_2() -> Any:
    """Return tf_keras, with `tf.keras` being the same, or say what to set."""
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
            "keras_moe.tfrs needs tf.keras to be Keras 2, and something has made it "
            f"Keras {version}: set TF_USE_LEGACY_KERAS=1 before Python "
            "starts, or import keras_moe.tfrs first"
        )
    return tf_keras


tf_keras: Any = _import_keras_2()


@tf_keras.saving.register_keras_serializable("keras_moe")
class LegacyLayer(tf_keras.layers.Layer):
    """A Keras 3 layer or model as a layer of Keras 2 (tf_keras).

    Its weights are the weights of `layer`, trained, frozen, named and saved as those of
    any layer of Keras 2: by `tf.train.Checkpoint`, `save_weights`, `model.save` and
    `tf.saved_model.save`. Its losses are among the model's `losses`.

    Args:
        layer: a Keras 3 layer or model. It is wrapped, not copied.
        name: str, the name of this layer; that of `layer` by default.
        **kwargs: further arguments of a Keras 2 layer. Not `dtype`: `layer` casts by
            its own policy.

    Call arguments:
        inputs: what `layer` takes first.
        *args: what `layer` takes next.
        training: bool, handed on if `layer` takes it.
        mask: handed on if `layer` takes it.
        **kwargs: further arguments of `layer`.

    Returns:
        What `layer` returns.

    Raises:
        ValueError: if `layer` is not a Keras 3 layer, or `dtype` is given.

    Example:

    >>> mmoe = keras_moe.layers.MMoE(4, 16, tasks=["click", "buy"])
    >>> inputs = tf.keras.Input((8,))
    >>> outputs = keras_moe.tfrs.LegacyLayer(mmoe)(inputs)
    >>> tf.keras.Model(inputs, outputs).output_shape["buy"]
    (None, 16)

    Under a strategy of several replicas the model is called once, on a few rows, within
    `strategy.scope()`, before it is trained.
    """

    def __init__(self, layer: Any, name: str | None = None, **kwargs: Any) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "`layer` must be a Keras 3 layer or model; a layer of Keras 2 needs no "
                f"LegacyLayer. Received: layer={layer!r}"
            )
        if kwargs.pop("dtype", None) is not None:
            raise ValueError(
                "`dtype` must not be given: the layer has a dtype policy of its own, "
                f"{layer.dtype_policy.name}"
            )
        # `layer` casts its inputs itself, so this one must not.
        kwargs = {"trainable": layer.trainable, **kwargs, "autocast": False}
        super().__init__(name=name or layer.name, dtype=_policy(layer), **kwargs)
        # Past the tracking of Keras 2, which saves what Keras 3 tracks but does not
        # find it again; `_track` names what is saved.
        object.__setattr__(self, "layer", layer)
        self._trainable = kwargs["trainable"]
        self.supports_masking = layer.supports_masking
        takes = inspect.signature(layer.call).parameters
        self._handed_on = [name for name in ("training", "mask") if name in takes]
        if layer.built:
            self._track()
        # A callable is asked for each reading of `losses`, however often it was called.
        self.add_loss(self._regularization)

    # Keras 2 sets this attribute on every layer of a model that is frozen.
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
        # The states of metrics and of random numbers, too, which a call changes.
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
            # On the shapes alone, so that a checkpoint that waits is read before the
            # first outputs.
            shapes = keras.tree.map_structure(_symbolic, ((inputs, *args), kwargs))
            self.layer(*shapes[0], **shapes[1])
            self._track()
        given = {"training": training, "mask": mask}
        for name in self._handed_on:
            if given[name] is not None:
                kwargs[name] = given[name]
        # Keras 3 clears losses in its own training loop, which does not run here.
        self.layer._clear_losses()
        outputs = self.layer(inputs, *args, **kwargs)
        losses = self.layer.losses
        self.add_loss(losses[: len(losses) - len(self._regularized())])
        return outputs

    def _check_may_build(self) -> None:
        """Refuse to make weights in a replica, where they would stay empty."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1 and not tf.distribute.in_cross_replica_context():
            raise ValueError(
                f"the weights of {self.name!r} must exist before {replicas} replicas "
                "train them: call the model once, on a few rows, within "
                "`strategy.scope()`"
            )

    def _track(self) -> None:
        """Let checkpoints and SavedModels find the weights and the tables."""
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
        """Return the sum of the weights' regularization, 0 without any."""
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
        # In the order of the layer, which does not depend on what is frozen.
        variables = self.layer.variables
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"the file holds {len(store.keys())} weights for {self.name!r}, which "
                f"has {len(variables)}. Call the layer once before its weights are "
                "loaded, so that it has them all"
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
    """Return the policy of Keras 2 with the dtypes of a layer of Keras 3."""
    compute, variables = layer.compute_dtype, layer.variable_dtype
    mixed = compute != variables == "float32" and compute in ("float16", "bfloat16")
    return tf_keras.mixed_precision.Policy(f"mixed_{compute}" if mixed else compute)


def _symbolic(value: Any) -> Any:
    """Return what stands for a tensor where only its shape and dtype count."""
    if not tf.is_tensor(value):
        return value
    return keras.KerasTensor(value.shape, value.dtype.name)
