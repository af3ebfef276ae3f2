"""M3oE: shared, scenario and task experts for several scenarios and tasks.

Axis letters: n rows, d input features, s shared experts, p scenarios, t tasks, u output
units.

All experts read x; there is one of each scenario, E_j, and one of each task, T_j. For a
row of scenario q, the output of task k (Zhang et al. 2024) is
y_k = sum_i g_qk(x)_i S_i(x) + beta_s D_q(x) + beta_t T'_k(x),
with a softmax gate g_qk over the shared experts S_i for each scenario and task, and
D_q(x) = alpha_s E_q(x) + (1 - alpha_s) mean of E_j(x) over the other scenarios j,
T'_k(x) = alpha_t T_k(x) + (1 - alpha_t) mean of T_j(x) over the other tasks j.
The first level of fusion, alpha, balances own and other experts within a module, the
second, beta, the modules. All four are learned, each the sigmoid of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.layers._mixture import GatedMixture
from keras_moe.layers._parts import layer_name
from keras_moe.layers._scenarios import (
    check_scenario_shape,
    checked_scenario,
    scenario_index,
)


@keras.saving.register_keras_serializable("keras_moe")
class M3oE(GatedMixture):
    """Multi-domain multi-task mixture of experts: for several scenarios and tasks.

    Three modules learn what all have in common, what is specific to a scenario, and
    what is specific to a task; learned weights balance them.

    Args:
        num_shared_experts: int, number of experts for all scenarios and tasks, s.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        num_scenarios: int, number of scenarios p.
        own_weight: float in (0, 1), initial value of both alpha: the weight of the own
            expert of a scenario or task; the experts of the others share the rest.
        module_weight: float in (0, 1), initial value of both beta: the weights of the
            scenario module and the task module, beside the shared experts' 1.
        experts: a layer of `keras_moe.experts` with the `s + p + t` experts: shared
            ones first, then those of the scenarios, then those of the tasks. Default:
            `MLPExperts`.
        **kwargs: expert and gate arguments of `MMoE`, from `activation` to `seed`;
            not `top_k` and `dispatch`.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        scenario: integer tensor of the leading axes of `inputs`, the scenario of each
            row, in [0, p). A row with another id gets the mean of the scenarios'
            experts and the mean of their gates.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Attributes:
        balance_logits: the weights of the fusion, of shape `(4,)`: the logits of
            alpha_s, alpha_t, beta_s and beta_t. With one scenario (or task) its alpha
            has no effect.

    Raises:
        ValueError: if an argument is invalid, `scenario` does not hold integers, or its
            shape is not that of the leading axes of `inputs`.

    Example:

    >>> m3oe = keras_moe.layers.M3oE(
    ...     num_shared_experts=2,
    ...     expert_units=(32, 16),
    ...     tasks=["click", "buy"],
    ...     num_scenarios=3,
    ... )
    >>> m3oe(np.ones((2, 8)), np.array([0, 2]))["buy"].shape == (2, 16)
    True

    Gates and fusion weights are computed in float32 under any dtype policy, then cast
    once. Every expert and gate is computed for every row.

    The paper's first layer, which maps the inputs by weights of the scenario, is a
    separate `STAR` before this layer. Towers are separate too, one of a task for all
    scenarios; in the paper there is one for each scenario and task. The paper optimizes
    the fusion weights on validation data (AutoML), here they are learned with the other
    weights.

    References:
        - [Zhang et al., 2024: M3oE: Multi-Domain Multi-Task Mixture-of-Experts
          Recommendation Framework](https://arxiv.org/abs/2404.18465)
    """

    def __init__(
        self,
        num_shared_experts: int,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        num_scenarios: int = 1,
        *,
        own_weight: float = 0.8,
        module_weight: float = 0.5,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(expert_units, tasks, name=layer_name(name, "m3oe"), **kwargs)
        self.num_shared_experts = _checks.positive_int(
            "num_shared_experts", num_shared_experts
        )
        self.num_scenarios = _checks.positive_int("num_scenarios", num_scenarios)
        self.own_weight = _between_0_and_1("own_weight", own_weight)
        self.module_weight = _between_0_and_1("module_weight", module_weight)
        s, p, t = self.num_shared_experts, self.num_scenarios, self._tasks.count
        self.check_levels(1)
        self.experts = self.make_experts(s + p + t)
        self.gates = self.make_gates(p * t, s)

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        scenario_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        check_scenario_shape(scenario_shape, inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        # A symbolic call builds experts of any kind if they are not built yet.
        self.experts(keras.KerasTensor((None, features), self.compute_dtype))
        self.gates.build(inputs_shape)
        initial = [_logit(self.own_weight)] * 2 + [_logit(self.module_weight)] * 2
        self.balance_logits = self.add_weight(
            name="balance_logits",
            shape=(4,),
            initializer=lambda shape, dtype: ops.convert_to_tensor(initial, dtype),
            dtype=self.precise_dtype,
            autocast=False,
        )

    def call(
        self, inputs: Any, scenario: Any, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        scenario = checked_scenario(scenario, inputs)
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        index = scenario_index(scenario, self.num_scenarios)  # (n,)
        gates = self._gate(rows, index, training)  # (n, t, s)
        weights = ops.concatenate([gates, *self._module_weights(index)], axis=-1)
        outputs = self.experts(rows, training=training)  # (n, s + p + t, u)
        mixtures = self.mix(weights, outputs)  # (n, t, u)
        shape = (*_backend.restored_axes(leading), mixtures.shape[-1])
        return self._tasks.pack(
            [ops.reshape(mixture, shape) for mixture in ops.unstack(mixtures, axis=1)]
        )

    def gate_weights(self, inputs: Any, scenario: Any) -> Any:
        """Return the gates over the shared experts in inference, `(..., t, s)`."""
        self.ensure_built(inputs, scenario)
        inputs = ops.convert_to_tensor(inputs)
        scenario = checked_scenario(scenario, inputs)
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        index = scenario_index(scenario, self.num_scenarios)
        gates = self._gate(rows, index, training=False)
        leading = _backend.restored_axes(ops.shape(inputs)[:-1])
        return ops.reshape(gates, (*leading, *gates.shape[-2:]))

    def _gate(self, rows: Any, index: Any, training: bool | None) -> Any:
        """(n, d), (n,) -> (n, t, s): the gates of each row's scenario."""
        p, t = self.num_scenarios, self._tasks.count
        gates = self.gate_probabilities(self.gate_logits(self.gates, rows), training)
        gates = ops.reshape(gates, (-1, p, t, self.num_shared_experts))
        own = _with_mean(ops.eye(p, dtype=gates.dtype))
        own = ops.take(own, index, axis=0)[:, :, None, None]  # (n, p, 1, 1)
        return ops.sum(own * gates, axis=1)

    def _module_weights(self, index: Any) -> tuple[Any, Any]:
        """(n,) -> (n, t, p), (n, t, t): the weights of scenario and task experts."""
        p, t = self.num_scenarios, self._tasks.count
        own_s, own_t, beta_s, beta_t = ops.unstack(ops.sigmoid(self.balance_logits))
        of_scenarios = ops.take(_with_mean(_own_and_others(own_s, p)), index, axis=0)
        of_scenarios = ops.repeat(ops.expand_dims(beta_s * of_scenarios, 1), t, axis=1)
        of_tasks = ops.expand_dims(beta_t * _own_and_others(own_t, t), 0)
        # Broadcast to all rows, whose number may be unknown.
        return of_scenarios, of_tasks + ops.zeros_like(of_scenarios[..., :1])

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        scenario_shape: tuple[int | None, ...] | None = None,
    ) -> Any:
        units = self.output_units(self.experts, inputs_shape[-1])
        return self._tasks.repeat((*inputs_shape[:-1], units))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_shared_experts": self.num_shared_experts,
            "num_scenarios": self.num_scenarios,
            "own_weight": self.own_weight,
            "module_weight": self.module_weight,
        }


def _own_and_others(own: Any, count: int) -> Any:
    """Return (m, m): `own` on the diagonal, the rest of each row shared evenly."""
    if count == 1:
        return ops.ones((1, 1), dtype=own.dtype)
    eye = ops.eye(count, dtype=own.dtype)
    return own * eye + (1.0 - own) / (count - 1) * (1.0 - eye)


def _with_mean(weights: Any) -> Any:
    """(p, p) -> (p + 1, p): a last row, for an unknown scenario, of even weights."""
    p = weights.shape[0]
    return ops.concatenate([weights, ops.full((1, p), 1.0 / p, dtype=weights.dtype)])


def _between_0_and_1(name: str, value: Any) -> float:
    checked = _checks.positive_number(name, value)
    if checked >= 1.0:
        raise ValueError(
            f"`{name}` must be in (0, 1): it is the sigmoid of a weight. "
            f"Received: {name}={value!r}"
        )
    return checked


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))
