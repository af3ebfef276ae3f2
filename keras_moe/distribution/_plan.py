"""A plan on paper: memory, communication and time of a training step.

Letters: p devices, a devices over which experts are split, n tokens of a batch, d input
features, u output units, k choices per token, s bytes of a number.

A ring of g devices moves, for each device and N bytes of the whole tensor,
(g - 1) / g N in an all-gather, a reduce-scatter or an all-to-all, and twice that in an
all-reduce (Thakur et al. 2005).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from keras_moe import _checks
from keras_moe.dispatch._capacity import DEFAULT_FACTOR
from keras_moe.experts import StackedKernels
from keras_moe.layers._parts import HasDispatch


class Plan(NamedTuple):
    """What a device needs for a training step.

    Attributes:
        strategy: "data", "experts" or "experts and rows".
        mesh: dict from axis names to sizes.
        weight_bytes: int, bytes of the weights on a device.
        memory_bytes: int, weights, their gradients and the optimizer's slots, without
            activations.
        communication_bytes: dict, bytes that a device sends in a step, by what is sent:
            "gradients", "tokens" (to experts and back), "rows" (of tables).
        flops: float, operations of a device in matmuls.
        compute_seconds: float.
        communication_seconds: float.
    """

    strategy: str
    mesh: dict[str, int]
    weight_bytes: int
    memory_bytes: int
    communication_bytes: dict[str, float]
    flops: float
    compute_seconds: float
    communication_seconds: float

    @property
    def step_seconds(self) -> float:
        """Computation and then communication; a compiler may overlap them."""
        return self.compute_seconds + self.communication_seconds


def plan(
    model: Any,
    num_devices: int,
    batch_size: int,
    *,
    bandwidth: float,
    flops: float,
    expert_devices: int | None = None,
    optimizer_slots: int = 2,
    tokens_per_row: int = 1,
    ids_per_row: int = 1,
    table_rows: int | None = None,
) -> list[Plan]:
    """Return the memory, communication and time of a training step, without a device.

    Three strategies are compared: all variables replicated ("data"), experts split
    ("experts"), and tables split by rows as well ("experts and rows"). The figures are
    those of the programs that `expert_parallel` gives (matmuls, gradients, tokens to
    experts, rows of tables; not activations and not small reductions of losses). On JAX
    the gradient of a table has the size of the table, which "data" sums over devices.

    Args:
        model: a built Keras model or layer.
        num_devices: int, p.
        batch_size: int, rows of a global batch.
        bandwidth: float, bytes per second that a device sends.
        flops: float, floating-point operations per second of a device, as achieved.
        expert_devices: int, a, a divisor of `num_devices` and of every layer's number
            of experts. If it equals `num_devices`, experts share the axis of the batch,
            else they have their own. Default: the largest divisor of both.
        optimizer_slots: int, variables of the optimizer per weight (2 for Adam).
        tokens_per_row: int, tokens of a row, such as the length of a sequence.
        ids_per_row: int, ids of a row that a table looks up.
        table_rows: int, if given, every table is planned with so many rows, so that the
            model itself can be small.

    Returns:
        A list of three `Plan`.

    Raises:
        ValueError: if the model is not built, or an argument is invalid.

    Example:

    >>> moe = keras_moe.layers.MoE(num_experts=8, expert_units=(64, 16))
    >>> moe.build((None, 16))
    >>> data, experts, rows = keras_moe.distribution.plan(
    ...     moe, num_devices=8, batch_size=1024, bandwidth=1e11, flops=1e14
    ... )
    >>> data.weight_bytes, experts.weight_bytes
    (68608, 9024)

    References:
        - [Thakur et al., 2005: Optimization of Collective Communication Operations in
          MPICH](https://doi.org/10.1177/1094342005051521)
    """
    if not getattr(model, "built", False):
        raise ValueError(
            "`model` must be built: call it once, or `model.build(input_shape)`. "
            f"Received: model={model!r}"
        )
    p = _checks.positive_int("num_devices", num_devices)
    rows = _checks.positive_int("batch_size", batch_size)
    _checks.positive_number("bandwidth", bandwidth)
    _checks.positive_number("flops", flops)
    if table_rows is not None:
        _checks.positive_int("table_rows", table_rows)
    slots = _checks.count("optimizer_slots", optimizer_slots)
    tokens = rows * _checks.positive_int("tokens_per_row", tokens_per_row)
    ids = rows * _checks.positive_int("ids_per_row", ids_per_row)
    routed = list(_routed(model))
    a = _checked_expert_devices(expert_devices, p, routed)
    experts = {id(v) for layer in routed for v in layer.experts.weights}
    tables = [
        layer
        for layer in model._flatten_layers(include_self=True)
        if isinstance(layer, keras.layers.Embedding)
    ]
    in_tables = {id(v) for layer in tables for v in layer.weights}
    whole = {id(v): _bytes(v) for v in model.weights}
    if table_rows is not None:
        for table in tables:
            variable = table.embeddings
            whole[id(variable)] *= table_rows / variable.shape[0]
    plans = []
    for strategy in ("data", "experts", "experts and rows"):
        over = 1 if strategy == "data" else a
        mesh = {"batch": p} if over in (1, p) else {"batch": p // a, "expert": a}
        parts = dict.fromkeys(experts, over)
        if strategy == "experts and rows":
            parts |= dict.fromkeys(in_tables, max(mesh.values()))
        sizes = {key: size / parts.get(key, 1) for key, size in whole.items()}
        weights = sum(sizes.values())
        sent = {
            "gradients": sum(
                _gradient_bytes(sizes[id(v)], parts.get(id(v), 1), mesh)
                for v in model.trainable_variables
            ),
            "tokens": sum(_token_bytes(layer, tokens, mesh, over) for layer in routed),
            "rows": 0.0,
        }
        if strategy == "experts and rows":
            sent["rows"] = sum(_row_bytes(table, ids, mesh) for table in tables)
        work = _flops(model, routed, in_tables, tokens, mesh, over)
        plans.append(
            Plan(
                strategy,
                mesh,
                round(weights),
                round(weights * (2 + slots)),
                sent,
                work,
                work / flops,
                sum(sent.values()) / bandwidth,
            )
        )
    return plans


def _routed(model: Any) -> Iterator[Any]:
    """Yield the layers that send tokens to stacked experts."""
    for layer in model._flatten_layers(include_self=True):
        experts = getattr(layer, "experts", None)
        sparse = getattr(layer, "top_k", None) is not None
        stacked = isinstance(experts, StackedKernels)
        if sparse and stacked and isinstance(layer, HasDispatch):
            yield layer


def _choices(layer: Any) -> int:
    """Return k, the experts that are computed for a token."""
    chosen = getattr(layer, "_max_chosen", None)  # Of several gates together.
    return layer.top_k if chosen is None else chosen()


def _checked_expert_devices(given: int | None, p: int, routed: list[Any]) -> int:
    """Return a, by default the largest divisor of p and all numbers of experts."""
    if given is None:
        return math.gcd(p, *[layer.num_experts for layer in routed])
    _checks.positive_int("expert_devices", given)
    wrong = [layer for layer in routed if layer.num_experts % given]
    if p % given or wrong:
        counts = [layer.num_experts for layer in routed]
        raise ValueError(
            "`expert_devices` must divide `num_devices` and the number of experts of "
            f"every routed layer, {counts}. "
            f"Received: expert_devices={given}, num_devices={p}"
        )
    return given


def _bytes(variable: Any) -> float:
    bits = re.search(r"\d+", str(variable.dtype))
    return math.prod(variable.shape) * (int(bits.group()) / 8 if bits else 1.0)


def _all_reduce(size: float, devices: int) -> float:
    return 2 * _all_gather(size, devices)


def _all_gather(size: float, devices: int) -> float:
    """Return the bytes of a device, also for a reduce-scatter or an all-to-all."""
    return size * (devices - 1) / devices


def _gradient_bytes(size: float, parts: int, mesh: dict[str, int]) -> float:
    """Gradients are summed over the devices that hold the same part of a weight."""
    p = math.prod(mesh.values())
    if parts == p:
        return 0.0
    # A weight that is not split gets one gradient from each part of the batch.
    return _all_reduce(size, mesh["batch"])


def _token_bytes(layer: Any, tokens: int, mesh: dict[str, int], parts: int) -> float:
    """Bytes of tokens to their experts and back, and of their gradients."""
    if parts == 1:
        return 0.0
    d = layer.input_spec.axes[-1]
    k, u = _choices(layer), layer.experts.compute_output_shape((None, d))[-1]
    s = 2 if layer.compute_dtype.endswith("16") else 4
    weights = 4 * k
    if not hasattr(layer, "router"):  # Outputs of all choices, weighted afterwards.
        weights, u = 0, k * u
    if "expert" in mesh:
        here = tokens / mesh["batch"]
        # The outputs; then the gradients of tokens and weights.
        return _all_reduce(here * (s * (u + d) + weights), parts)
    if getattr(layer, "_has_capacity", bool)():
        factor = layer.capacity_factor or DEFAULT_FACTOR
        return 2 * _all_gather(factor * k * tokens / parts * s * (d + u), parts)
    # Tokens, indices and weights; outputs; then the gradients of all but the indices.
    return _all_gather(tokens * (2 * s * (d + u) + 2 * weights + 4 * k), parts)


def _flops(
    model: Any,
    routed: list[Any],
    in_tables: set[int],
    tokens: int,
    mesh: dict[str, int],
    parts: int,
) -> float:
    """Operations of a device: the forward pass, and twice that in the backward pass."""
    choices = {id(v): (layer, v) for layer in routed for v in layer.experts.weights}
    total = 0.0
    for variable in model.weights:
        if id(variable) in in_tables or len(variable.shape) < 2:
            continue
        work = 2 * tokens * math.prod(variable.shape)
        if id(variable) not in choices:
            total += work / mesh["batch"]
            continue
        layer = choices[id(variable)][0]
        if len(variable.shape) == 3:
            share = _choices(layer) / layer.num_experts
            total += work * share / (mesh["batch"] * (parts if "expert" in mesh else 1))
    return 3 * total


def _row_bytes(table: Any, ids: int, mesh: dict[str, int]) -> float:
    """Bytes of the rows of a split table, and of their gradients."""
    raise NotImplementedError
