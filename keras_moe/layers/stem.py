"""Shared and task-specific embeddings, separated in the backward pass.

Axis letters: n rows, d input features, e experts, m experts of one task, s shared
experts, t tasks, u output units.

The experts of task k read its own embeddings x_k, the shared experts the shared ones
x_s. All forward, task-wise backward (Su et al. 2024): the gate of task k mixes the
experts of all tasks, with the gradient of other tasks' experts stopped, SG:
y_k = sum over own and shared experts of g_ki f_i + sum over others of g_ki SG(f_i),
g_k = softmax(W_k (x_k + x_s)).
A task's embeddings and experts are trained by that task only, but used by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.layers._mixture import GatedMixture, on_streams
from keras_moe.layers._parts import checked_batch, layer_name


@keras.saving.register_keras_serializable("keras_moe")
class STEM(GatedMixture):
    """Shared and task-specific embeddings with all-forward task-wise-backward gates.

    Args:
        num_shared_experts: int, experts on the shared embeddings, s.
        num_task_experts: int, experts on the embeddings of one task, m.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        num_levels: int, number of levels. Below the last one, a gate on the shared
            stream mixes all experts into the next shared stream. Gradients through it
            to task experts are stopped too, to keep tasks separate; the authors' code
            does not stop them.
        experts: sequence of layers of `keras_moe.experts`, one a level, each with the
            `t * m + s` experts of its level, those of the first task first and the
            shared ones last. Default: `MLPExperts`.
        **kwargs: expert and gate arguments of `MMoE`, from `activation` to `seed`;
            not `top_k` and `dispatch`.

    Call arguments:
        inputs: tensor of shape `(..., d)`, the concatenated shared embeddings of a
            row.
        task_inputs: tensor of shape `(..., t, d)`, the embeddings of each task, from
            separate tables. Default: `inputs` for every task, which leaves only the
            task-wise backward pass of the experts.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid, or `task_inputs` is not
            `(..., t, d)`.

    Example:

    >>> stem = keras_moe.layers.STEM(
    ...     num_shared_experts=1,
    ...     num_task_experts=1,
    ...     expert_units=(32, 16),
    ...     tasks=["click", "buy"],
    ... )
    >>> outputs = stem(np.ones((2, 8)), task_inputs=np.ones((2, 2, 8)))
    >>> outputs["buy"].shape == (2, 16)
    True

    Gates are computed in float32 under any dtype policy, then cast once.

    References:
        - [Su et al., 2024: STEM: Unleashing the Power of Embeddings for Multi-task
          Recommendation](https://arxiv.org/abs/2308.13537)
    """

    def __init__(
        self,
        num_shared_experts: int,
        num_task_experts: int,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        num_levels: int = 1,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(expert_units, tasks, name=layer_name(name, "stem"), **kwargs)
        self.num_shared_experts = _checks.positive_int(
            "num_shared_experts", num_shared_experts
        )
        self.num_task_experts = _checks.positive_int(
            "num_task_experts", num_task_experts
        )
        self.num_levels = _checks.positive_int("num_levels", num_levels)
        self.check_levels(self.num_levels)
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        levels = range(self.num_levels)
        self.experts = [self.make_experts(t * m + s, level) for level in levels]
        self.gates = [self.make_gates(t, t * m + s, level) for level in levels]
        self.shared_gates = [
            self.make_gates(1, t * m + s, level, name="shared_gate")
            for level in levels[:-1]
        ]

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        task_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        self._check_task_inputs(inputs_shape, task_inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        for level, experts in enumerate(self.experts):
            gates = [self.gates[level], *self.shared_gates[level : level + 1]]
            for gate in gates:
                gate.build((None, features))
            rows = keras.KerasTensor((None, features), self.compute_dtype)
            features = experts(rows).shape[-1]  # Builds any kind of layer.

    def call(
        self, inputs: Any, task_inputs: Any = None, training: bool | None = None
    ) -> dict[str, Any] | list[Any]:
        streams = self._first_streams(inputs, task_inputs)
        for level in range(self.num_levels):
            streams = self._extract(level, streams, training)
        return self._tasks.pack(streams)

    def gate_weights(self, inputs: Any, task_inputs: Any = None) -> list[Any]:
        """Return the gates of each level in inference: `[(..., t, e), ...]`.

        Experts of the first task come first, shared ones last.
        """
        self.ensure_built(inputs, task_inputs)
        inputs = ops.convert_to_tensor(inputs)
        if task_inputs is not None:
            task_inputs = ops.convert_to_tensor(task_inputs)
        streams = self._first_streams(inputs, task_inputs)
        found = []
        for level in range(self.num_levels):
            found.append(self._task_gates(level, streams, training=False))
            streams = self._extract(level, streams, training=False)
        return found

    def _first_streams(self, inputs: Any, task_inputs: Any) -> list[Any]:
        """Return the streams of the tasks, with the shared stream last."""
        if task_inputs is None:
            return [inputs] * (self._tasks.count + 1)
        self._check_task_inputs(inputs.shape, task_inputs.shape)
        task_inputs = checked_batch("task_inputs", task_inputs, inputs)
        inputs, task_inputs = self._as_float(inputs), self._as_float(task_inputs)
        return [*ops.unstack(task_inputs, num=self._tasks.count, axis=-2), inputs]

    def _as_float(self, tensor: Any) -> Any:
        """Return integers in the dtype of the layer, as Keras does it with floats."""
        is_float = keras.backend.is_float_dtype(tensor.dtype)
        return tensor if is_float else ops.cast(tensor, self.compute_dtype)

    def _extract(
        self, level: int, streams: Sequence[Any], training: bool | None
    ) -> list[Any]:
        """Return the streams of the next level; after the last, the task outputs."""
        t, m, s = self._tasks.count, self.num_task_experts, self.num_shared_experts
        outputs = on_streams(self.experts[level], streams, [m] * t + [s], training)
        gates = self._task_gates(level, streams, training)
        if level < self.num_levels - 1:
            logits = self.gate_logits(self.shared_gates[level], streams[-1])
            shared = self.gate_probabilities(logits, training)
            gates = ops.concatenate([gates, shared], axis=-2)
        # A stream trains its own experts and the shared ones, not those of other tasks.
        trained = ops.cast(_trained(t, m, s)[: gates.shape[-2]], gates.dtype)
        mixed = self.mix(gates * trained, outputs)
        mixed = mixed + self.mix(gates * (1.0 - trained), ops.stop_gradient(outputs))
        return list(ops.unstack(mixed, axis=-2))

    def _task_gates(
        self, level: int, streams: Sequence[Any], training: bool | None
    ) -> Any:
        *own, shared = streams
        # If all streams are the same tensor, one sum allows one matmul for all gates.
        same = all(stream is shared for stream in own)
        gate_inputs = (
            [own[0] + shared] * len(own) if same else [x + shared for x in own]
        )
        logits = self.gate_logits(self.gates[level], gate_inputs)
        return self.gate_probabilities(logits, training)

    def _check_task_inputs(
        self, inputs_shape: Sequence[int | None], shape: Sequence[int | None] | None
    ) -> None:
        if shape is None:
            return
        expected = (*inputs_shape[:-1], self._tasks.count, inputs_shape[-1])
        same = len(shape) == len(expected) and all(
            a is None or b is None or a == b
            for a, b in zip(shape, expected, strict=True)
        )
        if not same:
            raise ValueError(
                "`task_inputs` must have the shape (..., t, d), which is "
                f"{expected}. Received: task_inputs of shape {tuple(shape)}"
            )

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        task_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> Any:
        units = inputs_shape[-1]
        for experts in self.experts:
            units = self.output_units(experts, units)
        return self._tasks.repeat((*inputs_shape[:-1], units))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_shared_experts": self.num_shared_experts,
            "num_task_experts": self.num_task_experts,
            "num_levels": self.num_levels,
        }


def _trained(t: int, m: int, s: int) -> np.ndarray:
    """(t + 1, t * m + s): 1 where a stream, the shared one last, trains an expert."""
    own = np.repeat(np.eye(t + 1, t), m, axis=1)
    return np.concatenate([own, np.ones((t + 1, s))], axis=1)
