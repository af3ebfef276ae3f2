"""Base classes of the multi-task layers: experts, and gates that mix them.

Axis letters: n rows, d input features, e experts, t tasks, g gates, u output units.

A *stream* is the input of one task's experts at a level; the shared stream is the input
of the shared experts. At the first level every stream is the input of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend, _checks, routing
from keras_moe.experts._mlp import StackedMLP
from keras_moe.experts._stacked import beside
from keras_moe.initializers import independent, is_seeded
from keras_moe.layers._in_turn import fits, mixtures_in_turn
from keras_moe.layers._mlp_layer import TaskLayer
from keras_moe.layers._parts import (
    check_experts,
    checked_expert_units,
    deserialized,
    serialized,
)


class Gates(StackedMLP):
    """The gates of a level: MLPs whose outputs are logits.

    The name is part of `.keras` files: the path of a weight in a list of layers has the
    name of the layer's class.
    """


class Mixture(TaskLayer):
    """Experts and task outputs; see `MMoE` for the arguments."""

    def __init__(
        self,
        expert_units: int | Sequence[int] | None,
        tasks: int | Sequence[str] | None,
        *,
        experts: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, **kwargs)
        self.expert_units = checked_expert_units(expert_units)
        self._experts_given = experts

    def make_experts(
        self, num_experts: int, level: int = 0, any_layer: bool = False
    ) -> keras.layers.Layer:
        """Return the experts of a level: those given, or MLPs."""
        given = self._experts_given
        argument = "experts"
        if given is not None and not any_layer:
            given, argument = self._levels_given()[level], f"experts[{level}]"
        check_experts(given, num_experts, self.expert_units, any_layer, argument)
        if given is not None:
            return given
        return self.make_mlps(
            num_experts,
            self.expert_units,
            name=_name_of_level("experts", level),
            kernel_initializer=_initializer_of_level(self.kernel_initializer, level),
            # seed + 1 is the seed of the gates' dropout.
            seed=_checks.next_seed(self.seed, level + (level > 0)),
        )

    def check_levels(self, num_levels: int) -> None:
        """Raise ValueError unless `experts` has one separate layer per level."""
        if self._experts_given is None:
            return
        given = self._levels_given()
        if len(given) != num_levels or len({id(layer) for layer in given}) < num_levels:
            raise ValueError(
                "`experts` must hold a separate layer for each level. Received: "
                f"num_levels={num_levels}, experts={given!r}"
            )

    def _levels_given(self) -> Sequence[keras.layers.Layer]:
        """Return the given experts as a sequence with one layer per level."""
        given = self._experts_given
        return given if isinstance(given, list | tuple) else [given]

    def mix(self, gates: Any, expert_outputs: Any) -> Any:
        """(..., g, e), (..., e, u) -> (..., g, u): y_g = sum_k gate_gk f_k(x)."""
        return ops.matmul(
            ops.cast(gates, self.compute_dtype),
            ops.cast(expert_outputs, self.compute_dtype),
        )

    def mixtures(self, gates: Any, expert_outputs: Any) -> list[Any]:
        """(..., g, e), (..., e, u) -> g mixtures (..., u)."""
        return list(ops.unstack(self.mix(gates, expert_outputs), axis=-2))

    def mix_experts(
        self,
        gates: Any,
        experts: Any,
        streams: Sequence[Any],
        counts: Sequence[int],
        training: bool | None,
        used: Sequence[Sequence[int]] | None = None,
    ) -> list[Any]:
        """Return the g mixtures (..., u) of `counts[i]` experts on `streams[i]`.

        In programs for a TPU the experts are computed in turn, see `_in_turn`.

        Args:
            gates: (..., g, e), maybe without the leading axes.
            experts: layer of e experts.
            streams: list of (..., d).
            counts: list of ints that sum to e.
            training: bool, whether dropout is active.
            used: for each gate the indices of the experts whose weight is not always 0.
                Default: all.
        """

        def side_by_side() -> list[Any]:
            outputs = on_streams(experts, streams, counts, training)
            return self.mixtures(gates, outputs)

        def in_turn() -> list[Any]:
            pieces = experts.on_pieces(_pieces(streams, counts), training=training)
            leading = _backend.restored_axes(ops.shape(streams[0])[:-1])
            outputs = [ops.reshape(y, (*leading, y.shape[-1])) for y in pieces]
            own = used or [range(len(outputs))] * gates.shape[-2]
            return mixtures_in_turn(
                outputs, gates, own, self.compute_dtype, self.precise_dtype
            )

        same_dtype = self.compute_dtype == getattr(experts, "compute_dtype", None)
        if same_dtype and fits(experts, streams[0], training):
            return _backend.on_tpu_or(in_turn, side_by_side)
        return side_by_side()

    def ensure_built(self, *inputs: Any) -> None:
        """Build the layer on `inputs` if it has not been called yet."""
        if not self.built:
            self(*inputs)

    def output_units(self, experts: keras.layers.Layer, features: int | None) -> int:
        """Return u, the output width of `experts` for an input of width `features`."""
        rows = keras.KerasTensor((None, features), self.compute_dtype)
        return experts.compute_output_spec(rows).shape[-1]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "expert_units": self.expert_units,
            "experts": serialized(self._experts_given),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**{**config, "experts": deserialized(config.get("experts"))})


class GatedMixture(Mixture):
    """Experts, softmax gates and task outputs; see `MMoE` for the arguments.

    Subclasses call `make_experts` and `make_gates` once per level, and turn gate logits
    into expert weights with `gate_probabilities`.
    """

    def __init__(
        self,
        expert_units: int | Sequence[int] | None,
        tasks: int | Sequence[str] | None,
        *,
        gate_units: int | Sequence[int] = (),
        gate_temperature: float = 1.0,
        gate_dropout: float = 0.0,
        gate_use_bias: bool = False,
        gate_kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(expert_units, tasks, **kwargs)
        self.gate_units = _checks.unit_sizes("gate_units", gate_units, allow_empty=True)
        self.gate_temperature = _checks.divisor(
            "gate_temperature", gate_temperature, self.precise_dtype
        )
        self.gate_dropout = _checks.rate("gate_dropout", gate_dropout)
        self.gate_use_bias = _checks.flag("gate_use_bias", gate_use_bias)
        self.gate_kernel_initializer = _checks.initializer(
            "gate_kernel_initializer", gate_kernel_initializer
        )
        if self.gate_dropout > 0.0:
            # Different from the seed of the experts' dropout.
            self.seed_generator = keras.random.SeedGenerator(
                _checks.next_seed(self.seed, 1)
            )

    def make_gates(
        self, num_gates: int, num_experts: int, level: int = 0, name: str = "gates"
    ) -> Gates:
        """Return stacked MLPs that map (..., d) to the logits (..., g, e).

        Gates of different widths in one level need different names.
        """
        initializer = _initializer_of_level(self.gate_kernel_initializer, level)
        # With one seed, gates and experts of one shape would start with equal values.
        if name != "gates" or is_seeded(self.gate_kernel_initializer):
            initializer = independent(initializer, *name.encode())
        return Gates(
            num_gates,
            (*self.gate_units, num_experts),
            use_bias=self.gate_use_bias,
            kernel_initializer=initializer,
            dtype=self.precise_dtype,
            autocast=False,  # A mixed policy of the outer layer does not cast them.
            name=_name_of_level(name, level),
        )

    def gate_logits(self, gates: Gates, inputs: Any) -> Any:
        """(..., d) -> (..., g, e); `inputs` may be a list of one stream per gate."""
        if not isinstance(inputs, list):
            return gates(ops.cast(inputs, gates.compute_dtype))
        # One cast for each tensor: equal streams must stay the same object.
        full = {id(stream): ops.cast(stream, gates.compute_dtype) for stream in inputs}
        streams = [full[id(stream)] for stream in inputs]
        counts = [1] * len(streams)

        def in_turn() -> Any:
            pieces = gates.on_pieces(_pieces(streams, counts))
            return beside(pieces, ops.shape(streams[0])[:-1])

        def side_by_side() -> Any:
            return on_streams(gates, streams, counts)

        # One matmul computes all gates of one stream, also on a TPU.
        if len(full) > 1 and fits(gates, streams[0], training=False):
            return _backend.on_tpu_or(in_turn, side_by_side)
        return side_by_side()

    def gate_probabilities(
        self,
        logits: Any,
        training: bool | None,
        top_k: int | None = None,
        shared_top_k: int = 0,
    ) -> Any:
        """Return the softmax of `logits` over the last axis, in the dtype of `logits`.

        With `top_k`, only the `shared_top_k` experts that the gates of a row choose
        together, and the k largest others of each gate, are not 0. The weights of a
        gate are renormalized to sum to 1. If it has only one they are not, as a
        renormalized single weight is always 1 and has no gradient; it stays the
        softmax over all experts (Switch Transformer).
        """
        if logits.shape[-1] == 1:
            # Avoids Keras' warnings on a softmax of size 1 and on missing gradients.
            return 1.0 + 0.0 * logits
        logits = logits / self.gate_temperature
        remaining = logits
        if training and self.gate_dropout > 0.0:
            remaining = self._drop_experts(logits)
        if top_k is None:
            return ops.softmax(remaining, axis=-1)
        kept = _chosen(remaining, top_k, shared_top_k)
        if shared_top_k and remaining is not logits:
            # The other gates may have chosen only experts that this gate has dropped.
            usable = ops.logical_and(kept, ops.isfinite(remaining))
            usable = ops.any(usable, axis=-1, keepdims=True)
            remaining = ops.where(usable, remaining, logits)
        if top_k + shared_top_k == 1:
            gates = ops.softmax(remaining, axis=-1)
            return ops.where(kept, gates, ops.zeros_like(gates))
        return ops.softmax(ops.where(kept, remaining, -float("inf")), axis=-1)

    def _drop_experts(self, logits: Any) -> Any:
        """Mask logits before the softmax, which renormalizes the remaining gates."""
        draw = keras.random.uniform(ops.shape(logits), seed=self.seed_generator)
        kept = draw >= self.gate_dropout
        kept = ops.logical_or(kept, ops.logical_not(ops.any(kept, -1, keepdims=True)))
        return ops.where(kept, logits, -float("inf"))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "gate_units": self.gate_units,
            "gate_temperature": self.gate_temperature,
            "gate_dropout": self.gate_dropout,
            "gate_use_bias": self.gate_use_bias,
            "gate_kernel_initializer": keras.initializers.serialize(
                self.gate_kernel_initializer
            ),
        }


def _chosen(logits: Any, top_k: int, shared_top_k: int) -> Any:
    """(..., g, e) -> bool (..., g, e): the choices of all gates, and of each gate."""
    if not shared_top_k:
        return _is_top(logits, top_k)
    scores = ops.sum(ops.softmax(logits, axis=-1), axis=-2, keepdims=True)
    shared = _is_top(scores, shared_top_k)  # (..., 1, e)
    if not top_k:
        return ops.logical_or(shared, ops.zeros_like(logits, dtype="bool"))
    others = ops.where(shared, -float("inf"), logits)
    return ops.logical_or(shared, _is_top(others, top_k))


def _is_top(scores: Any, k: int) -> Any:
    """Whether each of `scores` (..., e) is one of the k largest of the last axis."""
    chosen = routing.top_k(scores, k)
    return ops.sum(ops.one_hot(chosen, scores.shape[-1]), axis=-2) > 0


def on_streams(
    stacked: keras.layers.Layer,
    streams: Sequence[Any],
    counts: Sequence[int],
    training: bool | None = None,
) -> Any:
    """Apply `counts[i]` of the stacked experts to `streams[i]`: (..., e, u).

    If all streams are the same tensor, one matmul computes all experts.
    """
    used = [s for s, count in zip(streams, counts, strict=True) if count]
    if all(stream is used[0] for stream in used):
        return stacked(used[0], training=training)
    leading = ops.shape(streams[0])[:-1]
    if getattr(stacked, "fast_in_turn", False):  # Custom experts may lack it.
        pieces = stacked.on_pieces(_pieces(streams, counts), training=training)
        return beside(pieces, leading)
    outputs = stacked.on_slots(to_slots(streams, counts), training=training)
    return from_slots(outputs, leading)


def spread(gates: Any, owners: Sequence[int], num_blocks: int) -> Any:
    """(..., t, m) -> (..., t, num_blocks * m): gate i weights block `owners[i]`.

    With 0 elsewhere, one matmul mixes the outputs of all experts, which is faster than
    a small one per task. (An infinite output is then NaN for all gates: 0 times it.)
    """
    t, m = gates.shape[-2:]
    is_own = np.eye(num_blocks)[list(owners)][:, :, None]  # OpenVINO lacks `ops.eye`.
    blocks = ops.expand_dims(gates, -2) * ops.cast(is_own, gates.dtype)
    leading = _backend.restored_axes(ops.shape(gates)[:-2])
    return ops.reshape(blocks, (*leading, t, num_blocks * m))


def _pieces(streams: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """Return `counts[i]` times each of `streams` (..., d), as rows (n, d)."""
    return [
        piece
        for stream, count in zip(streams, counts, strict=True)
        for piece in [ops.reshape(stream, (-1, stream.shape[-1]))] * count
    ]


def to_slots(streams: Sequence[Any], counts: Sequence[int]) -> Any:
    """Stack `counts[i]` copies of each `streams[i]` (..., d): (e, n, d)."""
    return ops.stack(_pieces(streams, counts))


def from_slots(outputs: Any, leading: Sequence[Any]) -> Any:
    """(e, n, u) -> (..., e, u), with the leading axes restored."""
    e, u = outputs.shape[0], outputs.shape[-1]
    outputs = ops.transpose(outputs, (1, 0, 2))  # (n, e, u)
    return ops.reshape(outputs, (*_backend.restored_axes(leading), e, u))


def _initializer_of_level(initializer: Any, level: int) -> Any:
    """With a shared seed, levels would start as copies of each other."""
    return independent(initializer, level) if level else initializer


def _name_of_level(name: str, level: int) -> str:
    return f"{name}_{level}" if level else name
