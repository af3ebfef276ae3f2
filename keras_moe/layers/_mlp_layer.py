"""Base classes of layers that are made of MLPs: their arguments, and task outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import _checks
from keras_moe._layer import Layer
from keras_moe.experts import MLPExperts
from keras_moe.experts._stacked import activation_function
from keras_moe.layers._tasks import Tasks

# The arguments of `MLPLayer`, which a layer may pass on to another one.
MLP_ARGUMENTS = (
    "activation",
    "use_bias",
    "dropout",
    "kernel_initializer",
    "kernel_regularizer",
    "seed",
)


class MLPLayer(Layer):
    """A layer that makes MLPs; its subclasses document the arguments."""

    def __init__(
        self,
        *,
        activation: Any = "relu",
        use_bias: bool = True,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.activation = activation_function("activation", activation)
        self.use_bias = _checks.flag("use_bias", use_bias)
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = _checks.initializer(
            "kernel_initializer", kernel_initializer
        )
        self.kernel_regularizer = _checks.regularizer(
            "kernel_regularizer", kernel_regularizer
        )
        self.seed = _checks.seed(seed)

    def make_mlps(
        self, count: int, units: Any, name: str, **changes: Any
    ) -> MLPExperts:
        """Return `count` MLPs with stacked kernels, made with the layer's arguments."""
        arguments = {argument: getattr(self, argument) for argument in MLP_ARGUMENTS}
        arguments |= {"dtype": self.dtype_policy, "name": name}
        return MLPExperts(count, units, **arguments | changes)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
        }


class TaskLayer(MLPLayer):
    """A layer with one output per task, made of MLPs without a linear last layer."""

    def __init__(self, tasks: int | Sequence[str] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tasks = Tasks(tasks)

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The keys of the outputs: task names, or 0 to t - 1 for a number of tasks."""
        return self._tasks.keys

    def make_mlps(
        self, count: int, units: Any, name: str, **changes: Any
    ) -> MLPExperts:
        """`MLPLayer.make_mlps`, with the activation also after the last layer."""
        changes = {"final_activation": self.activation, **changes}
        return super().make_mlps(count, units, name, **changes)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return None if mask is None else self._tasks.repeat(mask)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self._tasks.config}
