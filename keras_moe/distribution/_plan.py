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
from keras import tree

from keras_moe import _checks
from keras_moe.dispatch._capacity import DEFAULT_FACTOR
from keras_moe.distribution._placements import (
    has_experts,
    layers_with_experts,
    placements_of,
)
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
            "gradients" (and kernels that are gathered), "tokens" (to experts and back),
            "rows" (of tables).
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

    What is split, and what is not, is what `expert_parallel` says for that mesh, with
    tables on the axis of the experts. FLOPs are those of all rows that a program has
    room for: the slots of "capacity", or an eighth more rows than are chosen.

    Args:
        model: a built Keras model or layer.
        num_devices: int, p.
        batch_size: int, rows of a global batch, a multiple of `num_devices`.
        bandwidth: float, bytes per second that a device sends.
        flops: float, floating-point operations per second of a device, as achieved.
        expert_devices: int, a, a divisor of `num_devices` and of the number of experts
            of every layer with a router (other experts that it does not divide are
            replicated). If it equals `num_devices`, experts share the axis of the
            batch, else they have their own. Default: the largest divisor of both.
        optimizer_slots: int, variables of the optimizer per weight (2 for Adam).
        tokens_per_row: int, tokens of a row, such as the length of a sequence.
        ids_per_row: int, ids of a row that a table looks up.
        table_rows: number, if given, every table is planned with so many rows, so that
            the model itself can be small.

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
    if rows % p:
        raise ValueError(
            "`batch_size` must be a multiple of `num_devices`. "
            f"Received: batch_size={rows}, num_devices={p}"
        )
    _checks.positive_number("bandwidth", bandwidth)
    _checks.positive_number("flops", flops)
    if table_rows is not None:
        _checks.positive_number("table_rows", table_rows)
    slots = _checks.count("optimizer_slots", optimizer_slots)
    tokens = rows * _checks.positive_int("tokens_per_row", tokens_per_row)
    ids = rows * _checks.positive_int("ids_per_row", ids_per_row)
    parts = _Parts(model, table_rows)
    a = _checked_expert_devices(expert_devices, p, list(layers_with_experts(model)))
    plans = []
    for strategy in ("data", "experts", "experts and rows"):
        over = 1 if strategy == "data" else a
        mesh = {"batch": p} if over in (1, p) else {"batch": p // a, "expert": a}
        axis = list(mesh)[-1]
        places = placements_of(
            model,
            (axis, over) if over > 1 else None,
            (axis, mesh[axis]) if strategy == "experts and rows" else None,
            table_rows,
        )
        split = {
            id(v): place.axes[0]
            for v, place in zip(model.weights, places, strict=True)
            if place.axes and place.axes[0] is not None
        }
        sizes = {
            key: size / (mesh[split[key]] if key in split else 1)
            for key, size in parts.sizes.items()
        }
        sent = {
            "gradients": sum(
                _gradient_bytes(v, parts, sizes[id(v)], mesh, split.get(id(v)))
                for v in model.trainable_variables
            ),
            "tokens": sum(
                _token_bytes(*mixture, tokens, mesh, split)
                for mixture in parts.mixtures
            ),
            "rows": sum(
                _row_bytes(table, ids, mesh, axis)
                for table in parts.tables
                if id(table.embeddings) in split
            ),
        }
        weights = sum(sizes.values())
        work = _flops(parts, tokens, mesh, split)
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
    """Mixtures and tables of a model, and the bytes of its weights by id."""

    def __init__(self, model: Any, table_rows: int | None) -> None:
        layers = model._flatten_layers(include_self=True)
        self.mixtures = list(_mixtures(layers))
        self.tables = [x for x in layers if isinstance(x, keras.layers.Embedding)]
        self.weights = model.weights
        self.mixture_of = {
            id(v): layer for layer, experts in self.mixtures for v in experts.weights
        }
        self.matmuls = _matmuls(layers)
        self.sizes = {id(v): _bytes(v) for v in model.weights}
        for table in self.tables if table_rows is not None else ():
            self.sizes[id(table.embeddings)] *= table_rows / table.input_dim


def _mixtures(layers: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the layers with stacked experts, and these (of each level)."""
    for layer in layers:
        for experts in tree.flatten(getattr(layer, "experts", None)):
            if has_experts(experts):
                yield layer, experts


def _matmuls(layers: list[Any]) -> set[int]:
    """Return the ids of the kernels by which all tokens, or those chosen, go."""
    found = set()
    for layer in layers:
        axes = 3 if isinstance(layer, StackedKernels) else 2
        if not isinstance(layer, keras.layers.Embedding):
            own = [*layer._trainable_variables, *layer._non_trainable_variables]
            found |= {id(v) for v in own if len(v.shape) >= axes}
    return found


def _rows_computed(layer: Any) -> float:
    """Return the share of all (token, expert) pairs that a mixture computes."""
    if not _is_sparse(layer):
        return 1.0
    if getattr(getattr(layer, "router", None), "choice", None) == "expert":
        room = layer.router.capacity_factor
    elif layer._has_capacity():
        room = layer.capacity_factor or DEFAULT_FACTOR
    else:
        room = 9 / 8
    return room * _choices(layer) / layer.num_experts


def _is_sparse(layer: Any) -> bool:
    """Whether a mixture computes the experts that are chosen, and not all."""
    return isinstance(layer, HasDispatch) and layer._resolve_dispatch() != "dense"


def _choices(layer: Any) -> int:
    """Return k, the experts that a token chooses, or that choose it on average."""
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


def _gradient_bytes(
    variable: Any, parts: _Parts, size: float, mesh: dict[str, int], axis: str | None
) -> float:
    """Bytes of the gradient of a variable, of `size` bytes on a device."""
    if axis != "batch":
        return _all_reduce(size, mesh["batch"])
    layer = parts.mixture_of.get(id(variable))
    if layer is None or _is_sparse(layer):
        return 0.0  # A part has the gradient of all rows.
    # XLA gathers the kernels of experts that compute all rows, and not the rows.
    return _all_gather(size * mesh[axis], mesh[axis]) + _all_reduce(
        size * mesh[axis], mesh[axis]
    )


def _token_bytes(
    layer: Any, experts: Any, tokens: int, mesh: dict[str, int], split: dict[int, Any]
) -> float:
    """Bytes of tokens to their experts and back, and of their gradients."""
    kernel = experts.weights[0]
    parts = mesh[split[id(kernel)]] if id(kernel) in split else 1
    d = kernel.shape[1]
    u = experts.compute_output_shape((None, d))[-1]
    s = 2 if layer.compute_dtype.endswith("16") else 4
    here = tokens / mesh["batch"]
    sparse = _is_sparse(layer)
    if sparse and getattr(getattr(layer, "router", None), "choice", None) == "expert":
        # They choose among the tokens of the whole batch, which are gathered.
        sent = 2 * _all_gather(tokens * s * (d + u), mesh["batch"])
        own = parts if "expert" in mesh else 1
        return sent + _all_reduce(here * s * (d + u), own)
    if parts == 1:
        return 0.0
    if not sparse:  # The mixtures of all gates, and the gradients of tokens.
        return _all_reduce(here * s * (_gates(layer) * u + d), mesh.get("expert", 1))
    k = _choices(layer)
    weights = 4 * k
    if not hasattr(layer, "router"):  # Outputs of all choices, weighted afterwards.
        weights, u = 0, k * u
    if "expert" in mesh:
        # The outputs; then the gradients of tokens and weights.
        return _all_reduce(here * (s * (u + d) + weights), parts)
    if layer._has_capacity():
        factor = layer.capacity_factor or DEFAULT_FACTOR
        return 2 * _all_gather(factor * k * tokens / parts * s * (d + u), parts)
    # Tokens, indices and weights; outputs; then the gradients of all but the indices.
    return _all_gather(tokens * (2 * s * (d + u) + 2 * weights + 4 * k), parts)


def _gates(layer: Any) -> int:
    """Return the number of mixtures of the experts, for each task one."""
    tasks = getattr(layer, "_tasks", None)
    return getattr(layer, "num_gates", 1 if tasks is None else tasks.count)


def _flops(
    parts: _Parts, tokens: int, mesh: dict[str, int], split: dict[int, Any]
) -> float:
    """Operations of a device: the forward pass, and twice that in the backward pass."""
    total = 0.0
    for variable in parts.weights:
        if id(variable) not in parts.matmuls:
            continue
        work = 2 * tokens * math.prod(variable.shape)
        layer = parts.mixture_of.get(id(variable))
        if layer is not None:
            work *= _rows_computed(layer)
        # What is not split is repeated along the axis of the experts.
        devices = mesh.values() if id(variable) in split else [mesh["batch"]]
        total += work / math.prod(devices)
    return 3 * total


def _row_bytes(table: Any, ids: int, mesh: dict[str, int], axis: str) -> float:
    """Bytes of the rows of a split table, and of their gradients."""
    width = 4 * table.output_dim
    if axis == "expert":
        return _all_reduce(ids / mesh["batch"] * width, mesh[axis])
    # Ids are gathered, rows summed over the parts, and their gradients gathered.
    gathered = _all_gather(ids * (4 + width), mesh[axis])
    return gathered + _all_reduce(ids * width, mesh[axis])
