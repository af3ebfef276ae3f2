"""What a router does, in figures: one metric that a layer updates as it routes.

Axis letters: n tokens, e experts, k choices a token, c capacity (slots an expert).

The state is sums alone, and figures are made of sums only when they are asked for.
Over several batches they are therefore the exact figures of all tokens together, not
means of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks, losses
from keras_moe.routing import (
    DenseRouting,
    ExpertChoiceRouting,
    Routing,
    checked_record,
    expert_counts,
)


@keras.saving.register_keras_serializable("keras_moe")
class RoutingMetrics(keras.metrics.Metric):
    """Load, drops, entropy and confidence of a router, over all batches since a reset.

    The figures, by their names in `show`:

    - `"expert_load"`: for each expert its share of all choices, before any is dropped.
      The e shares sum to 1. They stand in the result one by one, as
      `{prefix}_expert_load_0` and so on. Where each token goes to every expert, the
      share of an expert is that of its weights.
    - `"load_cv"`: the standard deviation of the expert loads (that of the population)
      over their mean: 0 for equal loads, `sqrt(e - 1)` if one expert has all.
    - `"dropped_fraction"`: the share of all choices that found no place within the
      capacity. Where experts choose, the share of tokens that no expert chose.
    - `"router_entropy"`: the mean entropy of a token's probabilities, in nats.
    - `"router_confidence"`: the mean of a token's highest probability.

    Padding does not count, nor does a token whose probabilities are not finite. A
    figure of nothing is 0.

    The sums are not among the `variables` of the metric. In training on JAX the call of
    a layer can change nothing but the `variables` of layers, so the layer that holds
    the metric has to list `sums` with its own:

        @property
        def variables(self):
            return [*super().variables, *self.routing_metrics.sums]

    They are then neither weights nor part of a file. On JAX, `fit` shows 0 during an
    epoch and the figures at its end, because a step cannot read what its own forward
    pass has changed; on the other backends the progress bar moves with every step.

    Args:
        num_experts: int, number of experts e.
        show: sequence of names from the list above. Only what they need is computed.
        prefix: str, what the names in the result start with. Layers of one model need
            different ones.
        name: str, name of the metric.

    Call arguments:
        routing: a record of `keras_moe.routing`, of any of the three kinds.
        kept: `(n, k)` bool for a `Routing`, which choices are within the capacity. All
            by default. None for the other kinds.

    Returns:
        A dict of scalars by `{prefix}_{figure}`, in the order of `show`.

    Attributes:
        KNOWN: the names of all figures.
        NEEDS_PROBS: the names of those that need a router with `router_probs`.
        sums: list of variables, float32 under any policy.

    Raises:
        ValueError: if an argument breaks its rule; by `update_state`, if `routing` is
            no record, does not agree with itself or with `num_experts`, or lacks the
            probabilities that a figure is made of, or if `kept` has another shape.

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
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.show = _checked_show(show)
        self.prefix = prefix
        needed = {part for figure in self.show for part in _SUMS_OF[figure]}
        self._sum_names = sorted(needed)
        self._sums = [self._add_sum(part) for part in self._sum_names]

    def _add_sum(self, name: str) -> Any:
        # `add_variable` would give a variable that a mixed policy rounds in the call of
        # a layer, where 256 + 1 is 256. The rest is as it is there.
        return keras.Variable(
            initializer="zeros",
            shape=(self.num_experts,) if name == "load" else (),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="sum",
            synchronization="on_read",
            name=name,
        )

    @property
    def sums(self) -> list[Any]:
        return list(self._sums)

    @property
    def variables(self) -> list[Any]:
        return []

    def update_state(self, routing: Any, kept: Any = None) -> None:
        routing = checked_record(routing, self.num_experts)
        _check_kept(routing, kept)
        self._check_probs(routing)
        counted = _counted(routing)
        for name, total in zip(self._sum_names, self._sums, strict=True):
            batch = _SUMS[name](routing, counted, kept, self.num_experts)
            total.assign(total + ops.cast(batch, "float32"))

    def _check_probs(self, routing: Any) -> None:
        wanting = [name for name in self.show if name in self.NEEDS_PROBS]
        if wanting and routing.router_probs is None:
            raise ValueError(
                f"`routing` must have router_probs for the figures {wanting}. "
                "Received: routing.router_probs=None"
            )

    def reset_state(self) -> None:
        for total in self._sums:
            total.assign(ops.zeros(total.shape, dtype="float32"))

    def result(self) -> dict[str, Any]:
        values = [_value(total) for total in self._sums]
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
        # For a step of training, Keras takes its value from every variable on JAX and
        # hands `result` those of metrics alone.
        return ops.zeros(total.shape, dtype="float32")


def _checked_show(show: Any) -> tuple[str, ...]:
    known = ", ".join(repr(name) for name in RoutingMetrics.KNOWN)
    if isinstance(show, str) or not isinstance(show, Sequence):
        raise ValueError(
            f"`show` must be a sequence of names out of {known}. "
            f"Received: show={show!r}"
        )
    for name in show:
        if name not in RoutingMetrics.KNOWN:
            raise ValueError(
                f"`show` must hold names out of {known}. Received: {name!r} in "
                f"show={show!r}"
            )
    return tuple(show)


def _check_kept(routing: Any, kept: Any) -> None:
    if kept is None:
        return
    if not isinstance(routing, Routing):
        raise ValueError(
            "`kept` must be None unless `routing` is a Routing, whose tokens choose. "
            f"Received: kept with a {type(routing).__name__}"
        )
    indices = {"routing.expert_indices": (routing.expert_indices, "nk")}
    _checks.axes(**indices, kept=(kept, "nk"))


# What the three kinds of record have in common: tokens that count, probabilities.


def _counted(record: Any) -> Any:
    """Return (n,) bool: tokens that are no padding and have finite probabilities."""
    probs, mask = record.router_probs, record.mask
    if probs is not None:
        finite = ops.all(ops.isfinite(probs), axis=-1)
        return finite if mask is None else ops.logical_and(finite, mask)
    if mask is not None:
        return ops.cast(mask, "bool")
    if isinstance(record, ExpertChoiceRouting):
        raise ValueError(
            "`routing` must have router_probs or a mask where experts choose, to tell "
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
    return -ops.sum(probs * ops.log(ops.maximum(probs, 1e-37)))  # 0 log 0 is 0.


def _confidence(record: Any, counted: Any, kept: Any, num_experts: int) -> Any:
    probs = _rows(record.router_probs, counted)
    # Without a value to start from, TensorFlow refuses the maximum of no tokens.
    return ops.sum(ops.max(probs, axis=-1, initial=0.0))


def _rows(values: Any, counted: Any) -> Any:
    """Return `values` (n, m) in float32, with zeros in the rows that do not count."""
    values = ops.cast(values, "float32")
    return ops.where(ops.expand_dims(counted, -1), values, ops.zeros_like(values))


def _sum(flags: Any) -> Any:
    return ops.sum(ops.cast(flags, "float32"))


# What they do not: who chose whom, and what came of it.


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
    # An empty slot holds n, hence one segment more.
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
    # Where nothing was counted the part is 0 too. A whole may be below 1: weights.
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
