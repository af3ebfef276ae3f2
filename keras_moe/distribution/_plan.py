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
    ("experts"), and tables split by rows as well ("experts and rows"). Counted are
    matmuls, gradients, tokens to experts and rows of tables; not activations and not
    small reductions of losses. On JAX the gradient of a table has the size of the
    table, which "data" sums over devices.

    Differences from a program of `expert_parallel`: FLOPs are those of the chosen rows,
    where "capacity" computes all slots, and dispatches of static shape compute more if
    experts are split; mixtures that compute every expert count as replicated; and
    tables are split over the longest axis (there, `table_axis`).

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
    parts = _Parts(model, table_rows)
    a = _checked_expert_devices(expert_devices, p, parts.routed)
    plans = []
    for strategy in ("data", "experts", "experts and rows"):
        over = 1 if strategy == "data" else a
        mesh = {"batch": p} if over in (1, p) else {"batch": p // a, "expert": a}
        split = {} if over == 1 else dict.fromkeys(parts.experts, list(mesh)[-1])
        if strategy == "experts and rows":
            split |= dict.fromkeys(parts.in_tables, _table_axis(mesh))
        sizes = {
            key: size / (mesh[split[key]] if key in split else 1)
            for key, size in parts.sizes.items()
        }
        sent = {
            # Split over the batch's axis, a part has the gradient of all rows.
            "gradients": sum(
                _all_reduce(sizes[id(v)], mesh["batch"])
                for v in model.trainable_variables
                if split.get(id(v)) != "batch"
            ),
            "tokens": sum(_token_bytes(x, tokens, mesh, over) for x in parts.routed),
            "rows": 0.0,
        }
        if strategy == "experts and rows":
            sent["rows"] = sum(_row_bytes(table, ids, mesh) for table in parts.tables)
        weights = sum(sizes.values())
        work = _flops(parts, tokens, mesh)
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


class _Parts:
    """Routed layers and tables of a model, and the bytes of its weights by id."""

    def __init__(self, model: Any, table_rows: int | None) -> None:
        layers = model._flatten_layers(include_self=True)
        self.routed = list(_routed(model))
        self.tables = [x for x in layers if isinstance(x, keras.layers.Embedding)]
        self.weights = model.weights
        self.experts = {id(v): x for x in self.routed for v in x.experts.weights}
        self.in_tables = {id(v) for table in self.tables for v in table.weights}
        self.sizes = {id(v): _bytes(v) for v in model.weights}
        for table in self.tables if table_rows is not None else ():
            self.sizes[id(table.embeddings)] *= table_rows / table.input_dim


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
    if layer._has_capacity():
        factor = layer.capacity_factor or DEFAULT_FACTOR
        return 2 * _all_gather(factor * k * tokens / parts * s * (d + u), parts)
    # Tokens, indices and weights; outputs; then the gradients of all but the indices.
    return _all_gather(tokens * (2 * s * (d + u) + 2 * weights + 4 * k), parts)


def _flops(parts: _Parts, tokens: int, mesh: dict[str, int]) -> float:
    """Operations of a device: the forward pass, and twice that in the backward pass."""
    total = 0.0
    for variable in parts.weights:
        if id(variable) in parts.in_tables or len(variable.shape) < 2:
            continue
        work = 2 * tokens * math.prod(variable.shape)
        layer = parts.experts.get(id(variable))
        if layer is None:
            total += work / mesh["batch"]  # Repeated along the axis of the experts.
        elif len(variable.shape) == 3:
            share = _choices(layer) / layer.num_experts
            total += work * share / math.prod(mesh.values())
    return 3 * total


def _row_bytes(table: Any, ids: int, mesh: dict[str, int]) -> float:
    """Bytes of the rows of a split table, and of their gradients."""
    axis = _table_axis(mesh)
    width = 4 * table.output_dim
    if axis == "expert":
        return _all_reduce(ids / mesh["batch"] * width, mesh[axis])
    # Ids are gathered, rows summed over the parts, and their gradients gathered.
    gathered = _all_gather(ids * (4 + width), mesh[axis])
    return gathered + _all_reduce(ids * width, mesh[axis])


def _table_axis(mesh: dict[str, int]) -> str:
    """Return the largest axis, the last one of equal axes."""
    return max(reversed(mesh), key=lambda axis: mesh[axis])
