"""AITM: information transferred along a chain of events.

Axis letters: n rows, d input features, k units of the transfer.

z_1 = q_1,  p_i = relu(W_i z_{i-1} + c_i),                        (Xi et al. 2021)
z_i = sum_{u in {p_i, q_i}} a_u V_i u,  a = softmax_u(<K_i u, Q_i u> / sqrt(k)),
y_i = sigmoid(tower_i(z_i)): the probability of stages 1..i,
L = sum_i loss(y_i) + calibrator_weight * mean of sum_{i > 1} max(y_i - y_{i-1}, 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.initializers import independent
from keras_moe.layers import Tower
from keras_moe.multitask.entire_space._base import EntireSpace
from keras_moe.multitask.task import Task


@keras.saving.register_keras_serializable("keras_moe")
class AITM(EntireSpace):
    """Adaptive information transfer multi-task network for a chain of events.

    Each stage but the first attends to its own features and to those that the previous
    stage passes on. Its output is the probability of all stages up to it; a calibrator
    adds a loss where that exceeds the probability of the previous one. The conditional
    probability for serving is the ratio of the two, at most 1.

    The calibrator counts every row of the batch, also those of sample weight 0.

    Args:
        stages: the names of the events, first to last, at least two.
        units: int, the width k of the transfer.
        tower_units: int or sequence of ints, hidden layers of the towers.
        calibrator_weight: float >= 0, the weight of the calibrator's loss; 0.6 in the
            paper.
        dropout: float in [0, 1), of the towers.
        kernel_initializer: initializer of the kernels, drawn independently.
        seed: int, the seed of the dropout.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        inputs: dict by stage of features `(n, d)`, all of the same d.
        training: bool, whether dropout is active.

    Returns:
        The same outputs as `ESMM`.

    Raises:
        ValueError: if an argument or the keys or shapes of the inputs are invalid.

    Example:

    >>> inputs = keras.Input((8,))
    >>> shared = keras_moe.layers.SharedBottom(16, ["click", "conversion"])(inputs)
    >>> aitm = keras_moe.multitask.AITM(units=16, tower_units=8)
    >>> list(aitm(shared))
    ['click', 'click_and_conversion', 'conversion']

    References:
        - [Xi et al., 2021: Modeling the Sequential Dependence among Audience Multi-step
          Conversions with Multi-task Learning in Targeted Display Advertising](
          https://arxiv.org/abs/2105.08489)
    """

    def __init__(
        self,
        stages: Sequence[str] = ("click", "conversion"),
        *,
        units: int,
        tower_units: int | Sequence[int] = (),
        calibrator_weight: float = 0.6,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(stages, **kwargs)
        self.units = _checks.positive_int("units", units)
        self.tower_units = _checks.unit_sizes("tower_units", tower_units, True)
        self.calibrator_weight = _checks.non_negative_number(
            "calibrator_weight", calibrator_weight
        )
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = _checks.initializer(
            "kernel_initializer", kernel_initializer
        )
        self.seed = _checks.seed(seed)
        self.towers = [
            Tower(
                self.tower_units,
                dropout=self.dropout,
                kernel_initializer=independent(self.kernel_initializer, 100 + i),
                seed=_checks.next_seed(self.seed, i),
                dtype=self.dtype_policy,
                name=f"{stage}_tower",
            )
            for i, stage in enumerate(self.stages)
        ]

    def build(self, input_shape: Mapping[str, Any]) -> None:
        super().build(input_shape)
        shape = tuple(input_shape[self.stages[0]])
        self.transfers: list[keras.layers.Dense] = []
        self.queries: list[keras.layers.Dense] = []
        self.keys: list[keras.layers.Dense] = []
        self.values: list[keras.layers.Dense] = []
        width = shape[-1]
        for i, stage in enumerate(self.stages[1:]):
            previous = width if i == 0 else self.units
            for j, (group, size, fan, activation) in enumerate(
                [
                    (self.transfers, width, previous, "relu"),
                    (self.queries, self.units, width, None),
                    (self.keys, self.units, width, None),
                    (self.values, self.units, width, None),
                ]
            ):
                layer = keras.layers.Dense(
                    size,
                    activation,
                    kernel_initializer=independent(self.kernel_initializer, 4 * i + j),
                    dtype=self.dtype_policy,
                    name=f"{stage}_{('transfer', 'query', 'key', 'value')[j]}",
                )
                layer.build((*shape[:-1], fan))
                group.append(layer)
        for i, tower in enumerate(self.towers):
            tower.build((*shape[:-1], width if i == 0 else self.units))

    def _check_shapes(self, shapes: Mapping[str, Any]) -> None:
        if len({tuple(shapes[stage])[-1] for stage in self.stages}) != 1:
            raise ValueError(
                "AITM expects features of the same last axis for every stage. "
                f"Received: {dict(shapes)}"
            )

    def call(
        self, inputs: Mapping[str, Any], training: bool | None = None
    ) -> dict[str, Any]:
        self._check_keys(inputs)
        joint: list[Any] = []
        features: Any = None
        for i, stage in enumerate(self.stages):
            own = ops.cast(inputs[stage], self.compute_dtype)
            features = own if i == 0 else self._attend(i - 1, features, own)
            logits = self.towers[i](features, training=training)
            joint.append(keras.activations.sigmoid(logits))
        outputs = {self.stages[0]: joint[0]}
        excess: Any = 0.0
        for i in range(1, len(self.stages)):
            outputs[self.joint_names[i]] = joint[i]
            ratio = joint[i] / ops.maximum(joint[i - 1], 1e-37)
            outputs[self.stages[i]] = ops.minimum(ratio, 1.0)
            excess = excess + ops.mean(ops.maximum(joint[i] - joint[i - 1], 0.0))
        if self.calibrator_weight:
            self.add_loss(self.calibrator_weight * excess)
        return outputs

    def _attend(self, i: int, previous: Any, own: Any) -> Any:
        """(n, k), (n, d) -> (n, k): the features of a stage after the first."""
        both = ops.stack([self.transfers[i](previous), own], axis=-2)  # (n, 2, d)
        scores = ops.sum(self.keys[i](both) * self.queries[i](both), -1, keepdims=True)
        attention = ops.softmax(scores / self.units**0.5, axis=-2)
        return ops.sum(attention * self.values[i](both), axis=-2)

    def compute_output_shape(self, input_shape: Mapping[str, Any]) -> dict[str, Any]:
        shape = (*tuple(input_shape[self.stages[0]])[:-1], 1)
        names = [self.stages[0]]
        for i in range(1, len(self.stages)):
            names += [self.joint_names[i], self.stages[i]]
        return dict.fromkeys(names, shape)

    def compute_output_spec(
        self, inputs: Mapping[str, Any], training: bool | None = None
    ) -> dict[str, Any]:
        return super().compute_output_spec(inputs)

    def _declare(self, metrics: Mapping[str, Sequence[Any]]) -> list[Task]:
        later = range(1, len(self.stages))
        return [
            self._first(metrics),
            *(self._joint(i, metrics, loss="head") for i in later),
            *(self._conditional(i, metrics, loss=None) for i in later),
        ]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "tower_units": self.tower_units,
            "calibrator_weight": self.calibrator_weight,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "seed": self.seed,
        }
