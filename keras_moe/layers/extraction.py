"""Task-specific and shared experts with customized gates, in one or more levels.

Axis letters: n rows, d input features, e experts, m experts of one task, s shared
experts, t tasks, u output units.

In a level (Tang et al. 2020, equations 1 to 5) the gate of task k mixes the experts of
task k and the shared ones, S_k:
y_k = sum over S_k of g_k(x_k)_i f_i,  g_k(x_k) = softmax(W_k x_k).
Below the last level a shared gate mixes all experts. Each mixture is the input of the
next level's experts and gates of the same task, or of the shared ones (equations 6, 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.layers._mixture import GatedMixture, spread
from keras_moe.layers._parts import layer_name


@keras.saving.register_keras_serializable("keras_moe")
class PLE(GatedMixture):
    """Progressive layered extraction: levels of task-specific and shared experts.

    Shared experts learn what tasks have in common, task experts what is specific to one
    task. Without task experts (`num_task_experts=0`) it is the multi-level MMoE, and
    with one level `MMoE`.

    Args:
        num_levels: int, number of levels.
        num_shared_experts: int >= 0, experts in each level for all tasks, s.
        num_task_experts: int >= 0, experts of one task in each level, m.
        expert_units: int or sequence of ints, the widths of an expert's layers, the
            same in each level. None if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
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

    >>> ple = keras_moe.layers.PLE(
    ...     num_levels=2,
    ...     num_shared_experts=1,
    ...     num_task_experts=2,
    ...     expert_units=(32, 16),
    ...     tasks=["click", "buy"],
    ... )
    >>> ple(np.ones((2, 8)))["buy"].shape == (2, 16)
    True

    Gates are computed in float32 under any dtype policy, then cast once. If an expert's
    output is infinite, those of all tasks are NaN.

    References:
        - [Tang et al., 2020: Progressive Layered Extraction (PLE): A Novel Multi-Task
          Learning Model for Personalized Recommendations](
          https://doi.org/10.1145/3383313.3412236)
    """

    def __init__(
        self,
        num_levels: int,
        num_shared_experts: int,
        num_task_experts: int,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        name = layer_name(name, "ple")
        super().__init__(expert_units, tasks, name=name, **kwargs)
        self.num_levels = _checks.positive_int("num_levels", num_levels)
        self.num_shared_experts = _checks.count(
            "num_shared_experts", num_shared_experts
        )
        self.num_task_experts = _checks.count("num_task_experts", num_task_experts)
        if num_shared_experts + num_task_experts == 0:
            raise ValueError(
                "`num_shared_experts` and `num_task_experts` must not both be 0. "
                "Received: num_shared_experts=0, num_task_experts=0"
            )
        if num_levels > 1 and num_shared_experts == 0:
            raise ValueError(
                "`num_shared_experts` must be >= 1 if num_levels > 1: only shared "
                "experts read the shared stream. "
                f"Received: num_levels={num_levels}, num_shared_experts=0"
            )
        self.check_levels(self.num_levels)
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        levels = range(self.num_levels)
        self.experts = [self.make_experts(t * m + s, level) for level in levels]
        self.gates = [self.make_gates(t, m + s, level) for level in levels]
        self.shared_gates = [
            self.make_gates(1, t * m + s, level, name="shared_gate")
            for level in levels[:-1]
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        for level, experts in enumerate(self.experts):
            gates = [self.gates[level], *self.shared_gates[level : level + 1]]
            for gate in gates:
                gate.build((None, features))
            rows = keras.KerasTensor((None, features), self.compute_dtype)
            features = experts(rows).shape[-1]  # Builds any kind of layer.

    def call(
        self, inputs: Any, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        streams = [inputs] * (self._tasks.count + 1)  # The shared stream comes last.
        for level in range(self.num_levels):
            streams = self._extract(level, streams, training)
        return self._tasks.pack(streams)

    def gate_weights(self, inputs: Any) -> list[Any]:
        """Return the gates of each level in inference: `[(..., t, m + s), ...]`.

        The experts of the task come first, then the shared ones.
        """
        self.ensure_built(inputs)
        streams = [ops.convert_to_tensor(inputs)] * (self._tasks.count + 1)
        found = []
        for level in range(self.num_levels):
            found.append(self._task_gates(level, streams, training=False))
            streams = self._extract(level, streams, training=False)
        return found

    def _extract(
        self, level: int, streams: Sequence[Any], training: bool | None
    ) -> list[Any]:
        """Return the streams of the next level; after the last, the task outputs."""
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        shared_experts = range(t * m, t * m + s)
        used = [[*range(i * m, i * m + m), *shared_experts] for i in range(t)]
        gates = self._task_gates(level, streams, training)  # (..., t, m + s)
        if m:
            own = spread(gates[..., :m], range(t), t)
            gates = ops.concatenate([own, gates[..., m:]], axis=-1)  # (..., t, e)
        if level < self.num_levels - 1:
            logits = self.gate_logits(self.shared_gates[level], streams[-1])
            shared = self.gate_probabilities(logits, training)
            gates = ops.concatenate([gates, shared], axis=-2)
            used.append([*range(t * m + s)])
        return self.mix_experts(
            gates, self.experts[level], streams, [m] * t + [s], training, used
        )

    def _task_gates(
        self, level: int, streams: Sequence[Any], training: bool | None
    ) -> Any:
        t = self._tasks.count
        logits = self.gate_logits(self.gates[level], list(streams[:t]))
        return self.gate_probabilities(logits, training)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> Any:
        units = input_shape[-1]
        for experts in self.experts:
            units = self.output_units(experts, units)
        return self._tasks.repeat((*input_shape[:-1], units))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_levels": self.num_levels,
            "num_shared_experts": self.num_shared_experts,
            "num_task_experts": self.num_task_experts,
        }


@keras.saving.register_keras_serializable("keras_moe")
class CGC(PLE):
    """Customized gate control: `PLE` of one level.

    Args:
        num_shared_experts: int >= 0, experts for all tasks, s.
        num_task_experts: int >= 0, experts of one task, m.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        **kwargs: further arguments of `PLE`; `experts` is one layer, or a sequence of
            one, with the `t * m + s` experts of the level.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> cgc = keras_moe.layers.CGC(
    ...     num_shared_experts=1,
    ...     num_task_experts=2,
    ...     expert_units=(32, 16),
    ...     tasks=["click", "buy"],
    ... )
    >>> cgc(np.ones((2, 8)))["buy"].shape == (2, 16)
    True

    References:
        - [Tang et al., 2020: Progressive Layered Extraction (PLE): A Novel Multi-Task
          Learning Model for Personalized Recommendations, section 4.1](
          https://doi.org/10.1145/3383313.3412236)
    """

    def __init__(
        self,
        num_shared_experts: int,
        num_task_experts: int,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            1,
            num_shared_experts,
            num_task_experts,
            expert_units,
            tasks,
            name=layer_name(name, "cgc"),
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["num_levels"]
        return config
