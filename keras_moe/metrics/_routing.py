"""Routing metrics: load, drops, entropy and confidence of a router.

Axis letters: n tokens, e experts, k choices per token, c capacity (slots per expert).

The state consists of sums, and `result` computes the figures from them. Over several
batches they are therefore exact figures over all tokens, not means of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks, losses
from keras_moe._layer import Layer, Untracked
from keras_moe.routing import (
    DenseRouting,
    ExpertChoiceRouting,
    Routing,
    checked_record,
    expert_counts,
)


@keras.saving.register_keras_serializable("keras_moe")
class RoutingMetrics(keras.metrics.Metric):
    """Load, drops, entropy and confidence of a router, accumulated over batches.

    Figures, by name in `show`:

    - `"expert_load"`: for each expert its share of all choices, before any is dropped.
      The e shares sum to 1. The result has them as `{prefix}_expert_load_0` and so on.
      For dense routing, the expert's share of the total combine weight.
    - `"load_cv"`: the population standard deviation of the expert loads, divided by
      their mean: 0 for equal loads, `sqrt(e - 1)` if one expert has the whole load.
    - `"dropped_fraction"`: the share of all choices dropped because of the capacity;
      for expert choice, the share of tokens that no expert chose.
    - `"router_entropy"`: the mean entropy of a token's router probabilities, in nats.
    - `"router_confidence"`: the mean over tokens of the highest probability.

    Padding and tokens with non-finite probabilities are not counted. Without any
    counted token, figures are 0.

    In a training step on JAX a call can only change the state of its layer. A metric
    that a layer updates in its `call` therefore keeps its sums there: pass a layer as
    `state_of`, which must have the method `add_state` (that of `MoE` and of every layer
    of this package). The sums are then neither weights nor saved. On JAX, `fit` shows 0
    during an epoch and the figures at its end, because a step cannot read state that
    its forward pass has changed; on the other backends the progress bar is updated at
    every step.

    Args:
        num_experts: int, number of experts e.
        show: sequence of names from the list above. Only the sums they need are kept.
        prefix: str, prefix of the names in the result, which must differ between the
            layers of a model.
        name: str, name of the metric.
        state_of: a layer of this package that holds the sums, see above. Default: the
            metric holds them, as any other of Keras.

    Call arguments:
        routing: a routing record of `keras_moe.routing`, of any of the three kinds.
        kept: bool tensor of shape `(n, k)` for a `Routing`, True for choices within the
            capacity. Default: all. None for the other kinds.

    Returns:
        A dict of scalars by `{prefix}_{figure}`, in the order of `show`.

    Attributes:
        KNOWN: the names of all figures.
        NEEDS_PROBS: the names of those that need a router with `router_probs`.
        sums: list of variables, float32 under any policy.

    Raises:
        ValueError: if an argument is invalid; in `update_state`, if `routing` is
            not a record, has inconsistent shapes, does not match `num_experts` or lacks
            probabilities that a figure needs, or if `kept` has a wrong shape.

    Example:

    >>> from keras_moe.routing import Routing
    >>> metric = keras_moe.metrics.RoutingMetrics(2, ["expert_load", "load_cv"])
    >>> metric.update_state(Routing(np.array([[0], [0], [1], [0]]), np.ones((4, 1))))
    >>> {name: float(value) for name, value in metric.result().items()}
    {'moe_expert_load_0': 0.75, 'moe_expert_load_1': 0.25, 'moe_load_cv': 0.5}
    """

    KNOWN: ClassVar[tuple[str, ...]] = (
        "expert_load",
        "load_cv",
        "dropped_fraction",
        "router_entropy",
        "router_confidence",
    )
    NEEDS_PROBS: ClassVar[frozenset[str]] = frozenset(
        {"router_entropy", "router_confidence"}
    )

    def __init__(
        self,
        num_experts: int,
        show: Sequence[str],
        prefix: str = "moe",
        name: str = "routing",
        *,
        state_of: Layer | None = None,
    ) -> None:
        super().__init__(name=_checks.text("name", name), dtype="float32")
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.show = _checks.names_from("show", show, self.KNOWN)
        self.prefix = _checks.text("prefix", prefix)
        needed = {part for figure in self.show for part in _SUMS_OF[figure]}
        self._sum_names = sorted(needed)
        if state_of is not None and not isinstance(state_of, Layer):
            raise ValueError(
                "`state_of` must be None or a layer of keras_moe. "
                f"Received: state_of={state_of!r}"
            )
        # False while a model is exported: `update_state` then does nothing.
        self.active = True
        sums = [self._add_sum(part, state_of) for part in self._sum_names]
        self._sums = Untracked(sums)
        if state_of is None:
            self._own_sums = sums  # Keras finds them here.

    def _add_sum(self, name: str, state_of: Layer | None) -> Any:
        options: dict[str, Any] = {
            "name": name,
            "shape": (self.num_experts,) if name == "load" else (),
            "initializer": "zeros",
            "dtype": "float32",
            "aggregation": "sum",
            "synchronization": "on_read",
        }
        if state_of is not None:
            return state_of.add_state(**options)
        # Like `add_variable`, but without autocast: a mixed policy would round the sums
        # to half precision in a layer call, where 256 + 1 is 256 in bfloat16.
        return keras.Variable(trainable=False, autocast=False, **options)

    @property
    def sums(self) -> list[Any]:
        return list(self._sums.variables)

    def update_state(self, routing: Any, kept: Any = None) -> None:
        if not self.active:
            return
        routing = checked_record(routing, self.num_experts)
        _check_kept(routing, kept)
        self._check_probs(routing)
        counted = _counted(routing)
        for name, total in zip(self._sum_names, self.sums, strict=True):
            batch = _SUMS[name](routing, counted, kept, self.num_experts)
            total.assign(total + ops.cast(batch, "float32"))

    def _check_probs(self, routing: Any) -> None:
        missing = [name for name in self.show if name in self.NEEDS_PROBS]
        if missing and routing.router_probs is None:
            raise ValueError(
                f"`routing` must have router_probs for the figures {missing}. "
                "Received: routing.router_probs=None"
            )

    def reset_state(self) -> None:
        for total in self.sums:
            total.assign(ops.zeros(total.shape, dtype="float32"))

    def result(self) -> dict[str, Any]:
        values = [_value(total) for total in self.sums]
        sums = dict(zip(self._sum_names, values, strict=True))
        figures: dict[str, Any] = {}
        for name in self.show:
            value = _FIGURES[name](*[sums[part] for part in _SUMS_OF[name]])
            if name == "expert_load":
                for expert in range(self.num_experts):
                    figures[f"{self.prefix}_{name}_{expert}"] = value[expert]
            else:
                figures[f"{self.prefix}_{name}"] = value
        return figures

    def get_config(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "show": list(self.show),
            "prefix": self.prefix,
            "name": self.name,
        }


def _value(total: Any) -> Any:
    try:
        return total.value
    except TypeError:
        # In a training step on JAX, variables are stateless, and Keras provides only
        # metric variables to `result`.
        return ops.zeros(total.shape, dtype="float32")


def _check_kept(routing: Any, kept: Any) -> None:
    if kept is None:
        return
    if not isinstance(routing, Routing):
        raise ValueError(
            "`kept` must be None unless `routing` is a Routing. "
            f"Received: kept with a {type(routing).__name__}"
        )
    indices = {"routing.expert_indices": (routing.expert_indices, "nk")}
    _checks.axes(**indices, kept=(kept, "nk"))


# Sums that are computed alike for the three kinds of record.


def _counted(record: Any) -> Any:
    """Return a (n,) bool mask of unpadded tokens with finite probabilities."""
    probs, mask = record.router_probs, record.mask
    if probs is not None:
        finite = ops.all(ops.isfinite(probs), axis=-1)
        return finite if mask is None else ops.logical_and(finite, mask)
    if mask is not None:
        return ops.cast(mask, "bool")
    if isinstance(record, ExpertChoiceRouting):
        raise ValueError(
            "`routing` must have router_probs or a mask for expert choice, to infer "
            "the number of tokens. Received: routing.router_probs=None, "
            "routing.mask=None"
        )
    token_first = (
        record.expert_indices if isinstance(record, Routing) else record.combine_weights
    )
    return ops.ones_like(token_first[:, 0], dtype="bool")


def _tokens(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    return _sum(counted)


def _entropy(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    probs = _rows(record.router_probs, counted)
    return ops.sum(losses.entropy(probs))


def _confidence(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    probs = _rows(record.router_probs, counted)
    # Without `initial`, TensorFlow cannot take the maximum of an empty batch.
    return ops.sum(ops.max(probs, axis=-1, initial=0.0))


def _rows(values: Any, counted: Any) -> Any:
    """Return `values` (n, m) in float32, with zeros in rows that are not counted."""
    values = ops.cast(values, "float32")
    return ops.where(ops.expand_dims(counted, -1), values, ops.zeros_like(values))


def _sum(flags: Any) -> Any:
    return ops.sum(ops.cast(flags, "float32"))


# Sums that depend on the kind of record: loads and drops.


def _load_of_choices(record: Routing, counted: Any, num_experts: int) -> Any:
    return expert_counts(record.expert_indices, num_experts, counted)


def _load_of_slots(record: ExpertChoiceRouting, counted: Any, num_experts: int) -> Any:
    filled = record.token_indices < ops.shape(counted)[0]
    return ops.sum(ops.cast(filled, "float32"), axis=-1)


def _load_of_weights(record: DenseRouting, counted: Any, num_experts: int) -> Any:
    return ops.sum(_rows(record.combine_weights, counted), axis=0)


def _choices(record: Routing, counted: Any) -> Any:
    return _sum(counted) * record.expert_indices.shape[-1]


def _dropped_choices(record: Routing, counted: Any, kept: Any) -> Any:
    if kept is None:
        return 0.0
    return _sum(ops.logical_and(ops.expand_dims(counted, -1), ops.logical_not(kept)))


def _unchosen_tokens(record: ExpertChoiceRouting, counted: Any, kept: Any) -> Any:
    n = ops.shape(counted)[0]
    slots = ops.reshape(ops.convert_to_tensor(record.token_indices), (-1,))
    # Empty slots hold n, hence n + 1 segments.
    experts_of = ops.segment_sum(ops.ones_like(slots), slots, num_segments=n + 1)
    return _sum(ops.logical_and(counted, experts_of[:n] == 0))


_LOADS: dict[type, Callable[..., Any]] = {
    Routing: _load_of_choices,
    ExpertChoiceRouting: _load_of_slots,
    DenseRouting: _load_of_weights,
}
_CANDIDATES: dict[type, Callable[..., Any]] = {
    Routing: _choices,
    ExpertChoiceRouting: lambda record, counted: _sum(counted),
    DenseRouting: lambda record, counted: _sum(counted),
}
_DROPS: dict[type, Callable[..., Any]] = {
    Routing: _dropped_choices,
    ExpertChoiceRouting: _unchosen_tokens,
    DenseRouting: lambda record, counted, kept: 0.0,
}


def _load(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    return _LOADS[record.kind](record, counted, num_experts)


def _candidates(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    return _CANDIDATES[record.kind](record, counted)


def _dropped(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    return _DROPS[record.kind](record, counted, kept)


# From sums to figures.


def _share(part: Any, whole: Any) -> Any:
    # If the whole is 0, so is the part. The whole may be below 1 for weights.
    return part / ops.where(whole > 0.0, whole, ops.ones_like(whole))


_SUMS: dict[str, Callable[..., Any]] = {
    "load": _load,
    "dropped": _dropped,
    "candidates": _candidates,
    "entropy": _entropy,
    "confidence": _confidence,
    "tokens": _tokens,
}
_SUMS_OF: dict[str, tuple[str, ...]] = {
    "expert_load": ("load",),
    "load_cv": ("load",),
    "dropped_fraction": ("dropped", "candidates"),
    "router_entropy": ("entropy", "tokens"),
    "router_confidence": ("confidence", "tokens"),
}
_FIGURES: dict[str, Callable[..., Any]] = {
    "expert_load": lambda load: _share(load, ops.sum(load)),
    "load_cv": lambda load: ops.sqrt(losses.cv_squared(load)),
    "dropped_fraction": _share,
    "router_entropy": _share,
    "router_confidence": _share,
}
