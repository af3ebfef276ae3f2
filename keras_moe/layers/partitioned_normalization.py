"""Batch normalization with statistics and scales of each scenario.

Axis letters: n rows, d features, p scenarios.

For a row z of scenario p (Sheng et al. 2021, section 4.2):
z' = (gamma * gamma_p) (z - mean_p) / sqrt(variance_p + epsilon) + (beta + beta_p),
with the moments of the scenario's rows in the batch in training, and their moving
averages in inference.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe._layer import Layer, given_or_attached
from keras_moe.layers._parts import layer_name
from keras_moe.layers._scenarios import (
    check_scenario_shape,
    checked_scenario,
    scenario_index,
)


@keras.saving.register_keras_serializable("keras_moe")
class PartitionedNormalization(Layer):
    """Batch normalization whose moments and scales depend on the scenario of a row.

    Scenarios (domains, markets, pages) have data of different distributions, whose
    moments one batch normalization would mix. Each feature has a scale and an offset
    that all scenarios share, and a scale and an offset of each scenario.

    Args:
        num_scenarios: int, number of scenarios p.
        momentum: float in [0, 1), momentum of the moving averages.
        epsilon: float >= 1.1e-19, added to the variance.

    Call arguments:
        inputs: tensor of shape `(..., d)`.
        scenario: integer tensor of the leading axes of `inputs`, the scenario of each
            row, in [0, p). Rows with another id get the shared scale and offset alone,
            and the moments of all rows.
        mask: bool tensor of the leading axes, False for rows to exclude from the
            moments.
        training: bool, whether to use the moments of the batch and to update the moving
            averages. Scenarios without a row in a batch keep theirs. Each replica of
            `tf.distribute` uses its own moments; the averages take their mean.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        ValueError: if an argument is invalid, `scenario` does not hold integers, or its
            shape is not that of the leading axes of `inputs`.

    Example:

    >>> layer = keras_moe.layers.PartitionedNormalization(num_scenarios=2)
    >>> x = np.array([[1.0], [3.0], [10.0], [50.0]])
    >>> outputs = layer(x, np.array([0, 0, 1, 1]), training=True)
    >>> [round(float(value), 2) for value in outputs[:, 0]]
    [-1.0, 1.0, -1.0, 1.0]

    In the paper a batch has rows of one scenario. Here it may have rows of several,
    each normalized by the rows of its own; a scenario with one row in a batch becomes
    its offset. Moments are computed in float32 under any dtype policy.

    References:
        - [Sheng et al., 2021: One Model to Serve All: Star Topology Adaptive
          Recommender for Multi-Domain CTR Prediction, section 4.2](
          https://arxiv.org/abs/2101.11427)
    """

    def __init__(
        self,
        num_scenarios: int,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        name = layer_name(name, "partitioned_normalization")
        super().__init__(name=name, **kwargs)
        self.supports_masking = True
        self.num_scenarios = _checks.positive_int("num_scenarios", num_scenarios)
        self.momentum = _checks.rate("momentum", momentum)
        self.epsilon = _checks.divisor("epsilon", epsilon)

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        scenario_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        check_scenario_shape(scenario_shape, inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        p = self.num_scenarios
        self.gamma = self._add("gamma", (features,), "ones")
        self.beta = self._add("beta", (features,), "zeros")
        self.scenario_gamma = self._add("scenario_gamma", (p, features), "ones")
        self.scenario_beta = self._add("scenario_beta", (p, features), "zeros")
        # The last row is of all scenarios together.
        shape = (p + 1, features)
        state = {"trainable": False, "aggregation": "only_first_replica"}
        self.moving_mean = self._add("moving_mean", shape, "zeros", **state)
        self.moving_variance = self._add("moving_variance", shape, "ones", **state)

    def _add(
        self, name: str, shape: tuple[int, ...], initializer: str, **options: Any
    ) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype=self.precise_dtype,
            autocast=False,
            **options,
        )

    def call(
        self,
        inputs: Any,
        scenario: Any,
        mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        mask = given_or_attached(mask, inputs)
        scenario = checked_scenario(scenario, inputs)
        shape, features = ops.shape(inputs), inputs.shape[-1]
        rows = ops.cast(ops.reshape(inputs, (-1, features)), self.precise_dtype)
        index = scenario_index(scenario, self.num_scenarios)  # (n,)
        # Like in Keras' batch normalization, a frozen layer keeps its averages.
        if training and self.trainable:
            mean, variance = self._moments(rows, index, mask)
        else:
            mean, variance = self.moving_mean, self.moving_variance
        scale = ops.concatenate(
            [self.gamma * self.scenario_gamma, ops.expand_dims(self.gamma, 0)]
        )
        offset = ops.concatenate(
            [self.beta + self.scenario_beta, ops.expand_dims(self.beta, 0)]
        )
        scale = scale * ops.rsqrt(variance + self.epsilon)  # (p + 1, d)
        mean, scale, offset = (
            ops.take(value, index, axis=0) for value in (mean, scale, offset)
        )
        outputs = ops.reshape((rows - mean) * scale + offset, shape)
        return ops.cast(outputs, self.compute_dtype)

    def _moments(self, rows: Any, index: Any, mask: Any) -> tuple[Any, Any]:
        """(n, d), (n,) -> mean and variance (p + 1, d), which update the averages."""
        counted = ops.ones_like(rows[:, 0], dtype="bool")
        if mask is not None:
            counted = ops.reshape(ops.cast(mask, "bool"), (-1,))
        rows = ops.where(counted[:, None], rows, ops.zeros_like(rows))
        counts = self._sums(ops.cast(counted, rows.dtype)[:, None], index)
        divisor = ops.maximum(counts, 1.0)  # (p + 1, 1)
        mean = self._sums(rows, index) / divisor

        def deviations(center: Any) -> Any:
            squares = ops.square(rows - center)
            return ops.where(counted[:, None], squares, ops.zeros_like(squares))

        own = self._sums(deviations(ops.take(mean, index, axis=0)), index)[:-1]
        total = ops.sum(deviations(mean[-1:]), axis=0, keepdims=True)
        variance = ops.concatenate([own, total]) / divisor
        seen = ops.cast(counts > 0.0, rows.dtype)
        self._move(self.moving_mean, mean, seen)
        self._move(self.moving_variance, variance, seen)
        return mean, variance

    def _move(self, average: Any, value: Any, seen: Any) -> None:
        """Move an average towards the mean over the replicas that saw the scenario."""
        change = _backend.sum_over_replicas(seen * (value - average))
        replicas = ops.maximum(_backend.sum_over_replicas(seen), 1.0)
        average.assign(average + (1.0 - self.momentum) * change / replicas)

    def _sums(self, values: Any, index: Any) -> Any:
        """(n, m) -> (p + 1, m): the sum of each scenario's rows, then that of all."""
        sums = ops.segment_sum(values, index, num_segments=self.num_scenarios + 1)
        return ops.concatenate([sums[:-1], ops.sum(sums, axis=0, keepdims=True)])

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return mask

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        scenario_shape: tuple[int | None, ...] | None = None,
    ) -> tuple[int | None, ...]:
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_scenarios": self.num_scenarios,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }
