"""Task-to-task fusion: a gate over all experts plus a residual of a task's own.

Axis letters: n rows, d input features, e experts, m experts of one task, s shared
experts, t tasks, u output units.

In a level (Li et al. 2023, section 3.2) the experts of task k read its stream x_k, and
the stream above is the sum of two fusions:
y_k = G_k(x_k) [all e experts] + v_k [the m experts of task k],
with the gate G_k(x_k) = softmax(W_k x_k), and learned weights v_k that do not depend on
the input (1 where a task has a single expert). The second fusion is a residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.initializers import independent
from keras_moe.layers._mixture import GatedMixture
from keras_moe.layers._parts import layer_name


@keras.saving.register_keras_serializable("keras_moe")
class AdaTT(GatedMixture):
    """Adaptive task-to-task fusion in one or more levels.

    Each task has its own experts. A gate per task mixes the experts of all tasks, and
    a residual adds the task's own experts. With shared experts it is the paper's
    general form, in which a shared module is one more task without a tower.

    Args:
        num_levels: int, number of levels.
        num_task_experts: int, experts in each level that belong to one task, m.
        expert_units: int or sequence of ints, the widths of an expert's layers, the
            same in each level. None if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        num_shared_experts: int >= 0, experts in each level that belong to no task, s.
        residual: bool, whether to add a residual of the task's own experts, which the
            paper finds crucial.
        experts: sequence of layers of `keras_moe.experts`, one a level, each with the
            `t * m + s` experts of its level, those of the first task first and the
            shared ones last. Default: `MLPExperts`.
        **kwargs: expert and gate arguments of `MMoE`, from `activation` to `seed`;
            not `top_k` and `dispatch`.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> adatt = keras_moe.layers.AdaTT(
    ...     num_levels=2,
    ...     num_task_experts=1,
    ...     expert_units=(32, 16),
    ...     tasks=["click", "buy"],
    ... )
    >>> adatt(np.ones((2, 8)))["buy"].shape == (2, 16)
    True

    Gates are computed in float32 under any dtype policy, then cast once.

    References:
        - [Li et al., 2023: AdaTT: Adaptive Task-to-Task Fusion Network for Multitask
          Learning in Recommendations](https://doi.org/10.1145/3580305.3599769)
    """

    def __init__(
        self,
        num_levels: int,
        num_task_experts: int,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        num_shared_experts: int = 0,
        residual: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(expert_units, tasks, name=layer_name(name, "adatt"), **kwargs)
        self.num_levels = _checks.positive_int("num_levels", num_levels)
        self.num_task_experts = _checks.positive_int(
            "num_task_experts", num_task_experts
        )
        self.num_shared_experts = _checks.count(
            "num_shared_experts", num_shared_experts
        )
        self.residual = _checks.flag("residual", residual)
        self.check_levels(self.num_levels)
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        levels = range(self.num_levels)
        self.experts = [self.make_experts(t * m + s, level) for level in levels]
        self.gates = [
            self.make_gates(t + self._has_shared_stream(level), t * m + s, level)
            for level in levels
        ]

    def _has_shared_stream(self, level: int) -> bool:
        """Whether the next level has a shared stream."""
        return self.num_shared_experts > 0 and level < self.num_levels - 1

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        self.own_weights: list[Any] = []
        self.shared_own_weights: list[Any] = []
        for level, experts in enumerate(self.experts):
            self.gates[level].build((None, features))
            rows = keras.KerasTensor((None, features), self.compute_dtype)
            features = experts(rows).shape[-1]  # Builds any kind of layer.
            if self.residual and m > 1:
                weights = self._add_own_weights(f"own_weights_{level}", t, m)
                self.own_weights.append(weights)
            if self.residual and s > 1 and self._has_shared_stream(level):
                weights = self._add_own_weights(f"shared_own_weights_{level}", 1, s)
                self.shared_own_weights.append(weights)

    def _add_own_weights(self, name: str, groups: int, size: int) -> Any:
        limit = size**-0.5
        uniform = keras.initializers.RandomUniform(-limit, limit, self.seed)
        return self.add_weight(
            name=name,
            shape=(groups, size),
            initializer=independent(uniform, *name.encode()),
            dtype=self.gates[0].dtype,
            autocast=False,
        )

    def call(
        self, inputs: Any, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        streams = [inputs] * (self._tasks.count + 1)  # The shared stream comes last.
        for level in range(self.num_levels):
            streams = self._fuse(level, streams, training)
        return self._tasks.pack(streams)

    def gate_weights(self, inputs: Any) -> list[Any]:
        """Return the gates of each level in inference: `[(..., t, e), ...]`.

        They exclude the residual. Experts of the first task come first, shared ones
        last. Below the last level, the shared stream's gate is the last row.
        """
        self.ensure_built(inputs)
        streams = [ops.convert_to_tensor(inputs)] * (self._tasks.count + 1)
        found = []
        for level in range(self.num_levels):
            found.append(self._level_gates(level, streams, training=False))
            streams = self._fuse(level, streams, training=False)
        return found

    def _fuse(
        self, level: int, streams: Sequence[Any], training: bool | None
    ) -> list[Any]:
        """Return the streams of the next level; after the last, the task outputs."""
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        counts = [m] * t + [s] * (s > 0)
        gates = self._level_gates(level, streams, training)
        if self.residual:
            gates = gates + self._residual(level, gates)
        return self.mix_experts(
            gates, self.experts[level], streams[: len(counts)], counts, training
        )

    def _level_gates(
        self, level: int, streams: Sequence[Any], training: bool | None
    ) -> Any:
        """(..., t, e), or (..., t + 1, e) if the next level has a shared stream."""
        count = self.gates[level].num_experts
        logits = self.gate_logits(self.gates[level], list(streams[:count]))
        return self.gate_probabilities(logits, training)

    def _residual(self, level: int, gates: Any) -> Any:
        """(g, e): the residual weights of each stream, 0 except for its own experts."""
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        own = ops.ones((t, m), gates.dtype)
        if m > 1:
            own = ops.convert_to_tensor(self.own_weights[level])
        # (t, m) -> (t, t * m), block-diagonal. OpenVINO lacks `ops.eye`.
        blocks = ops.cast(np.eye(t)[:, :, None], own.dtype)
        rows = ops.reshape(blocks * ops.expand_dims(own, 0), (t, t * m))
        if s:
            rows = ops.pad(rows, ((0, 0), (0, s)))
        if self._has_shared_stream(level):
            shared = ops.ones((1, s), gates.dtype)
            if s > 1:
                shared = ops.convert_to_tensor(self.shared_own_weights[level])
            last = ops.pad(shared, ((0, 0), (t * m, 0)))
            rows = ops.concatenate([rows, last], axis=0)
        return rows

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> Any:
        units = input_shape[-1]
        for experts in self.experts:
            units = self.output_units(experts, units)
        return self._tasks.repeat((*input_shape[:-1], units))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_levels": self.num_levels,
            "num_task_experts": self.num_task_experts,
            "num_shared_experts": self.num_shared_experts,
            "residual": self.residual,
        }
