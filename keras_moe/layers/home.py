"""A hierarchy of gates: experts for all tasks, for groups of tasks, and for each task.

Axis letters: n rows, d input features, e experts, c groups, t tasks, m experts of one
task or group, s shared experts, u output units, r rank of a feature gate.

Three ideas of Wang et al. 2024, section 3:

- Expert normalization (equation 6): an expert is Swish(BatchNorm(MLP(x))), which gives
  expert outputs a comparable scale.
- Hierarchy mask (3.2): at the first, *meta* level a group of tasks mixes its own
  experts and the shared ones. At the second a task mixes its own experts, those of its
  group and the shared ones; each reads its group's stream or the shared one.
- Feature gates (3.3): each expert reads v * 2 sigmoid(v B A) with B, A of rank r.
  Self gates: every stream adds a residual of its own experts, weighted by a sigmoid
  (for several experts, a softmax) of a linear map of the gate inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe._layer import given_or_attached
from keras_moe.experts import MLPExperts
from keras_moe.initializers import independent
from keras_moe.layers._mixture import (
    GatedMixture,
    from_slots,
    on_streams,
    spread,
    to_slots,
)
from keras_moe.layers._parts import layer_name


@keras.saving.register_keras_serializable("keras_moe")
class HoME(GatedMixture):
    """Hierarchy of multi-gate experts: sharing among all tasks, and within groups.

    Args:
        num_shared_experts: int, experts in each level for all tasks, s.
        num_task_experts: int, experts of one task, and of one group in each level, m.
        expert_units: int or sequence of ints, the widths of an expert's layers, the
            same in both levels.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        groups: sequence of sequences of tasks, by name if `tasks` are names, else by
            index; each task in one group. Default: one group of all tasks.
        expert_normalization: bool, whether experts end in batch normalization and
            Swish; if False, in `activation`.
        feature_gate_rank: int >= 0, the rank r of the experts' feature gates. 0: no
            feature gates.
        self_gate: bool, whether to add the residual of a stream's own experts.
        **kwargs: expert and gate arguments of `MMoE`, from `activation` to `seed`;
            not `experts`, `top_k` and `dispatch`.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        mask: bool tensor of the leading axes, False for rows to exclude from the
            batch statistics.
        training: bool, whether dropout is active and batch statistics are used.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> home = keras_moe.layers.HoME(
    ...     num_shared_experts=1,
    ...     num_task_experts=1,
    ...     expert_units=(32, 16),
    ...     tasks=["click", "like", "watch"],
    ...     groups=[["click", "like"], ["watch"]],
    ... )
    >>> home(np.ones((2, 8)))["like"].shape == (2, 16)
    True

    Gates are computed in float32 under any dtype policy, then cast once. The inputs of
    the second level's gates are the stream of the task's group and the shared one.

    References:
        - [Wang et al., 2024: HoME: Hierarchy of Multi-Gate Experts for Multi-Task
          Learning at Kuaishou](https://arxiv.org/abs/2408.05430)
    """

    def __init__(
        self,
        num_shared_experts: int,
        num_task_experts: int,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        groups: Sequence[Sequence[str | int]] | None = None,
        expert_normalization: bool = True,
        feature_gate_rank: int = 8,
        self_gate: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("experts") is not None:
            raise ValueError(
                "`experts` must be None: HoME makes its own experts. "
                f"Received: experts={kwargs['experts']!r}"
            )
        if expert_units is None:
            raise ValueError("`expert_units` must be given. Received: None")
        super().__init__(expert_units, tasks, name=layer_name(name, "home"), **kwargs)
        self.num_shared_experts = _checks.positive_int(
            "num_shared_experts", num_shared_experts
        )
        self.num_task_experts = _checks.positive_int(
            "num_task_experts", num_task_experts
        )
        self.groups = _checked_groups(groups, self._tasks.keys)
        tasks = self._tasks.keys
        self.group_of_task = [
            next(
                i
                for i, group in enumerate(self.groups or [list(tasks)])
                if task in group
            )
            for task in tasks
        ]
        self.num_groups = max(self.group_of_task) + 1
        self.expert_normalization = _checks.flag(
            "expert_normalization", expert_normalization
        )
        self.feature_gate_rank = _checks.count("feature_gate_rank", feature_gate_rank)
        self.self_gate = _checks.flag("self_gate", self_gate)

        t, c = self._tasks.count, self.num_groups
        m, s = self.num_task_experts, self.num_shared_experts
        self.experts = [
            self.make_experts(c * m + s, level=0),
            self.make_experts(t * m + c * m + s, level=1),
        ]
        self.norms = [self._make_norm(), self._make_norm()]
        self.group_gates = self.make_gates(c, m + s, name="group_gates")
        self.shared_gate = self.make_gates(1, c * m + s, name="shared_gate")
        self.task_gates = self.make_gates(t, 2 * m + s, level=1, name="task_gates")
        if self.self_gate:
            self.group_self_gates = self.make_gates(c, m, name="group_self_gates")
            self.shared_self_gate = self.make_gates(1, s, name="shared_self_gate")
            self.task_self_gates = self.make_gates(
                t, m, level=1, name="task_self_gates"
            )

    def make_experts(
        self, num_experts: int, level: int = 0, any_layer: bool = False
    ) -> keras.layers.Layer:
        """Return MLPs whose last layer is linear if normalization follows."""
        experts = super().make_experts(num_experts, level, any_layer)
        if self.expert_normalization:
            experts.final_activation = keras.activations.linear
        return experts

    def _make_norm(self) -> keras.layers.Layer | None:
        if not self.expert_normalization:
            return None
        return keras.layers.BatchNormalization(dtype=self.dtype_policy)

    def _make_feature_gates(self, level: int, features: int) -> MLPExperts:
        """Return the low-rank maps v B A of all experts of a level."""
        return MLPExperts(
            self.experts[level].num_experts,
            (self.feature_gate_rank, features),
            activation=None,
            use_bias=False,
            kernel_initializer=independent(
                self.gate_kernel_initializer, level, *b"feature_gates"
            ),
            dtype=self.precise_dtype,
            autocast=False,
            name=f"feature_gates_{level}",
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        self.shared_gate.build((None, features))
        self.group_gates.build((None, features))
        if self.self_gate:
            self.group_self_gates.build((None, features))
            self.shared_self_gate.build((None, features))
        units = self.experts[0].units[-1]
        self.feature_gates: list[MLPExperts] = []
        for level, width in enumerate((features, units)):
            self.experts[level].build((None, width))
            if self.feature_gate_rank:
                self.feature_gates.append(self._make_feature_gates(level, width))
                self.feature_gates[level].build((None, width))
            norm = self.norms[level]
            if norm is not None:
                norm.build((None, self.experts[level].num_experts * units))
        self.task_gates.build((None, 2 * units))
        if self.self_gate:
            self.task_self_gates.build((None, 2 * units))

    def call(
        self, inputs: Any, mask: Any = None, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        mask = given_or_attached(mask, inputs)
        if mask is not None:
            mask = ops.reshape(ops.cast(mask, "bool"), (-1,))
        inputs = ops.cast(inputs, self.compute_dtype)  # Inputs may be integers.
        *groups, shared = self._meta_level(inputs, training, mask)
        return self._tasks.pack(self._task_level(groups, shared, training, mask))

    def gate_weights(self, inputs: Any) -> list[Any]:
        """Return the gates in inference: `[(..., c, m + s), (..., t, 2m + s)]`.

        First the gates of the groups, over their own experts and the shared ones. Then
        the gates of the tasks, over their own experts, their group's and the shared
        ones. Self gates are excluded.
        """
        self.ensure_built(inputs)
        inputs = ops.convert_to_tensor(inputs)
        *groups, shared = self._meta_level(inputs, training=False)
        meta = self.gate_probabilities(
            self.gate_logits(self.group_gates, inputs), training=False
        )
        gate_inputs = self._task_gate_inputs(groups, shared)
        return [meta, self._task_gates(gate_inputs, training=False)]

    def _meta_level(
        self, inputs: Any, training: bool | None, mask: Any = None
    ) -> list[Any]:
        """Return the streams of the groups, with the shared stream last."""
        c, m, s = self.num_groups, self.num_task_experts, self.num_shared_experts
        streams = [inputs] * (c + 1)
        outputs = self._experts_of(0, streams, [m] * c + [s], training, mask)
        # (..., c, m + s)
        gates = self.gate_probabilities(
            self.gate_logits(self.group_gates, inputs), training
        )
        all_gate = self.gate_probabilities(
            self.gate_logits(self.shared_gate, inputs), training
        )  # (..., 1, c * m + s)
        own, shared = gates[..., :m], gates[..., m:]
        if self.self_gate:
            # A residual: more weight for the own experts.
            own = own + _self_gates(self.gate_logits(self.group_self_gates, inputs))
            logits = self.gate_logits(self.shared_self_gate, inputs)
            last = ops.zeros_like(all_gate[..., : c * m])
            last = ops.concatenate([last, _self_gates(logits)], axis=-1)
            all_gate = all_gate + last
        gates = ops.concatenate([spread(own, range(c), c), shared], axis=-1)
        return self.mixtures(ops.concatenate([gates, all_gate], axis=-2), outputs)

    def _task_level(
        self,
        groups: Sequence[Any],
        shared: Any,
        training: bool | None,
        mask: Any = None,
    ) -> list[Any]:
        t, c = self._tasks.count, self.num_groups
        m, s = self.num_task_experts, self.num_shared_experts
        of_task = [groups[group] for group in self.group_of_task]
        streams = [*of_task, *groups, shared]
        counts = [m] * (t + c) + [s]
        outputs = self._experts_of(1, streams, counts, training, mask)
        gate_inputs = self._task_gate_inputs(groups, shared)
        gates = self._task_gates(gate_inputs, training)  # (..., t, 2m + s)
        own = gates[..., :m]
        if self.self_gate:
            own = own + _self_gates(self.gate_logits(self.task_self_gates, gate_inputs))
        weights = [
            spread(own, range(t), t),
            spread(gates[..., m : 2 * m], self.group_of_task, c),
            gates[..., 2 * m :],
        ]
        return self.mixtures(ops.concatenate(weights, axis=-1), outputs)

    def _task_gate_inputs(self, groups: Sequence[Any], shared: Any) -> list[Any]:
        """Return the gate inputs of each task: its group's and the shared stream."""
        return [
            ops.concatenate([groups[group], shared], axis=-1)
            for group in self.group_of_task
        ]

    def _task_gates(self, gate_inputs: list[Any], training: bool | None) -> Any:
        logits = self.gate_logits(self.task_gates, gate_inputs)
        return self.gate_probabilities(logits, training)

    def _experts_of(
        self,
        level: int,
        streams: Sequence[Any],
        counts: Sequence[int],
        training: bool | None,
        mask: Any,
    ) -> Any:
        """(..., e, u): Swish(BatchNorm(MLP(x * FeatureGate(x)))) of every expert.

        Rows where the mask (n,) is False are excluded from the batch statistics.
        """
        experts, norm = self.experts[level], self.norms[level]
        if self.feature_gate_rank:
            slots = to_slots(streams, counts)
            feature_gates = self.feature_gates[level]
            logits = feature_gates.on_slots(ops.cast(slots, feature_gates.dtype))
            gates = ops.cast(2.0 * ops.sigmoid(logits), slots.dtype)
            outputs = experts.on_slots(slots * gates, training=training)
            outputs = from_slots(outputs, ops.shape(streams[0])[:-1])
        else:
            outputs = on_streams(experts, streams, counts, training)
        if norm is None:
            return outputs
        leading, (e, u) = ops.shape(outputs)[:-2], outputs.shape[-2:]
        flat = ops.reshape(outputs, (-1, e * u))
        normal = ops.silu(norm(flat, training=training, mask=mask))
        return ops.reshape(normal, (*_backend.restored_axes(leading), e, u))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> Any:
        return self._tasks.repeat((*input_shape[:-1], self.experts[0].units[-1]))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["experts"]
        return {
            **config,
            "num_shared_experts": self.num_shared_experts,
            "num_task_experts": self.num_task_experts,
            "groups": self.groups,
            "expert_normalization": self.expert_normalization,
            "feature_gate_rank": self.feature_gate_rank,
            "self_gate": self.self_gate,
        }


def _self_gates(logits: Any) -> Any:
    """Return residual weights of a stream's own experts."""
    if logits.shape[-1] == 1:
        return ops.sigmoid(logits)
    return ops.softmax(logits, axis=-1)


def _checked_groups(groups: Any, tasks: Sequence[Any]) -> list[list[Any]] | None:
    """Return the groups as lists, or None if all tasks are one group."""
    if groups is None:
        return None
    rule = "a sequence of sequences with every task exactly once"
    found = [
        # A string group would be split into characters.
        list(_checks.items("groups", group, rule))
        for group in _checks.items("groups", groups, rule)
    ]
    listed = [task for group in found for task in group]
    # `True` and 1.0 are equal to the task 1.
    known = all(type(task) is type(tasks[0]) and task in tasks for task in listed)
    once = known and len({*listed}) == len(listed) == len(tasks)
    if not once or not all(found):
        raise ValueError(
            f"`groups` must be {rule}. "
            f"Received: groups={groups!r} for the tasks {list(tasks)}"
        )
    return found
