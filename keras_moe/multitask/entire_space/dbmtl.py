"""DBMTL: targets that depend on other targets, as in a Bayesian network.

Axis letters: n rows, d input features, u units.

P(l, m | x) = prod_i P(y_i | x, parents of y_i): the hidden units of a target are
h_i = MLP_i([x_i, h_j for each parent j]), and its output is a tower of h_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._layer import Layer
from keras_moe.initializers import independent
from keras_moe.layers._tasks import Tasks


@keras.saving.register_keras_serializable("keras_moe")
class DBMTL(Layer):
    """Deep Bayesian multi-target learning: tasks read their parents' hidden units.

    Args:
        parents: dict by task of the names of the tasks that it depends on, which come
            before it: `{"click": [], "conversion": ["click"]}`.
        units: int or sequence of ints, the widths of each task's MLP.
        activation: activation of every layer.
        kernel_initializer: initializer of the kernels, drawn independently.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        inputs: dict by task of features `(n, d)`.

    Returns:
        A dict by task of features `(n, u)`, for the towers.

    Raises:
        ValueError: if `parents` or the keys of the inputs are invalid.

    Example:

    >>> chain = keras_moe.multitask.DBMTL({"click": [], "buy": ["click"]}, units=16)
    >>> features = chain({"click": np.ones((2, 8)), "buy": np.ones((2, 8))})
    >>> features["buy"].shape == (2, 16)
    True

    References:
        - [Wang et al., 2019: Multi-Objective Ranking via Deep Bayesian Multi-Target
          Learning](https://arxiv.org/abs/1902.09154)
    """

    takes_dict = True

    def __init__(
        self,
        parents: Mapping[str, Sequence[str]],
        units: int | Sequence[int],
        *,
        activation: Any = "relu",
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.parents = _checked(parents)
        self.units = _checks.unit_sizes("units", units)
        self.activation = _checks.activation("activation", activation)
        self.kernel_initializer = _checks.initializer(
            "kernel_initializer", kernel_initializer
        )
        # In one list: Keras 3.12 saves no layers of a list in a dict.
        self.mlp_layers = [
            keras.layers.Dense(
                size,
                self.activation,
                kernel_initializer=independent(
                    self.kernel_initializer, i * len(self.units) + j
                ),
                dtype=self.dtype_policy,
                name=f"{task}_{j}",
            )
            for i, task in enumerate(self.parents)
            for j, size in enumerate(self.units)
        ]

    @property
    def mlps(self) -> dict[str, list[keras.layers.Layer]]:
        """The layers of the MLP of each task."""
        layers = iter(self.mlp_layers)
        return {task: [next(layers) for _ in self.units] for task in self.parents}

    def _check_keys(self, inputs: Any) -> None:
        given = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        if not isinstance(given, list) or set(given) != set(self.parents):
            raise ValueError(
                f"DBMTL expects a dict of features with the keys {list(self.parents)}. "
                f"Received: {given}"
            )

    def build(self, input_shape: Mapping[str, Any]) -> None:
        self._check_keys(input_shape)
        for task, parents in self.parents.items():
            shape = tuple(input_shape[task])
            width = shape[-1] + self.units[-1] * len(parents)
            for layer, size in zip(self.mlps[task], self.units, strict=True):
                layer.build((*shape[:-1], width))
                width = size

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self._check_keys(inputs)
        hidden: dict[str, Any] = {}
        for task, parents in self.parents.items():
            features = [inputs[task], *(hidden[parent] for parent in parents)]
            outputs = ops.concatenate(features, axis=-1) if parents else features[0]
            for layer in self.mlps[task]:
                outputs = layer(outputs)
            hidden[task] = outputs
        return hidden

    def compute_output_shape(self, input_shape: Mapping[str, Any]) -> dict[str, Any]:
        return {
            task: (*tuple(input_shape[task])[:-1], self.units[-1])
            for task in self.parents
        }

    def compute_output_spec(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self._check_keys(inputs)
        shapes = self.compute_output_shape({k: v.shape for k, v in inputs.items()})
        return {
            task: keras.KerasTensor(shape, dtype=self.compute_dtype)
            for task, shape in shapes.items()
        }

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "parents": self.parents,
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _checked(parents: Any) -> dict[str, list[str]]:
    if not isinstance(parents, Mapping):
        raise ValueError(
            f"`parents` must be a dict of lists by task. Received: {parents!r}"
        )
    checked: dict[str, list[str]] = {}
    for task in Tasks(list(parents), "parents").keys:
        listed = isinstance(parents[task], list | tuple)
        if not listed or any(parent not in checked for parent in parents[task]):
            raise ValueError(
                "every task in `parents` must depend on tasks before it, given as a "
                f"list. Received: {task!r} with the parents {parents[task]!r}"
            )
        checked[task] = list(parents[task])
    return checked
