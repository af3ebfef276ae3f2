"""What the compiler of a TPU says of one step of a layer; no TPU is needed.

`python -m tests.benchmarks.tpu_programs CASE`, with a case as JSON, runs in the
environment "tpu" and with the variables that `accelerators` gives it. It prints the
figures as JSON.

Axis letters: n rows, d features, h hidden units, e experts, k choices per row.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from keras import ops

from keras_moe import dispatch as dispatch_lib
from keras_moe.dispatch._sorted import in_sorted_rows
from keras_moe.experts._protocol import apply_prologue
from keras_moe.layers import PLE, MMoE, MoE

# The clock of a core, GHz: peak FLOP/s by the FLOPs of its matrix units in a cycle.
CLOCKS = {"v5e": 1.5, "v6e": 1.75}


def figures(case: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the compiled program of a case."""
    start = time.perf_counter()
    program = compiled(case)
    text = program.as_text()
    costs, memory = program.cost_analysis(), program.memory_analysis()
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', text)
    return {
        "flops": costs["flops"],
        "bytes": costs["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "optimal_seconds": costs.get("optimal_seconds", 0.0),
        "cycle_seconds": sum(map(int, cycles)) / CLOCKS[case["device"]] / 1e9,
        # These have no cycles.
        "kernels": costs_of_kernels(text),
        "gather_bytes": bytes_of_gathers(text),
        "compile_seconds": time.perf_counter() - start,
    }


def costs_of_kernels(text: str) -> list[tuple[int, int]]:
    """Return the estimates of FLOPs and bytes of kernels, Pallas or `ragged_dot`."""
    costs = re.findall(
        r'custom_call_target="tpu_custom_call".*"cost_estimate":{"flops":"(\d+)".*?'
        r'"bytes_accessed":"(\d+)"',
        text,
    )
    return [(int(flops), int(moved)) for flops, moved in costs]


def bytes_of_gathers(text: str) -> int:
    """Return what gathers of the program read and write, each row once."""
    total = 0
    for line in text.partition("ENTRY")[2].splitlines():
        found = re.match(r"\s+(?:ROOT )?%gather\S* = (\S+) fusion\(", line)
        for dtype, shape in _shapes(found[1]) if found else ():
            total += 2 * _BYTES[dtype] * math.prod(shape)
    return total


def _shapes(text: str) -> list[tuple[str, list[int]]]:
    found = re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", text)
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in found]


_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def compiled(case: Mapping[str, Any]) -> Any:
    """Return the program of a case: outputs, and gradients by weights and inputs."""
    n, d = case["rows"], case["features"]
    dtype = case["dtype"]
    with variables_without_values():
        layer = Outer(layer_of(case), dtype=dtype)
        layer.build((n, d))
    trained, others = (
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )

    def loss(trained: Any, x: Any, others: Any, cotangents: Any) -> Any:
        outputs, _, losses = layer.stateless_call(
            trained, others, x, training=True, return_losses=True
        )
        pairs = zip(keras.tree.flatten(outputs), cotangents, strict=True)
        # The sum in float32, the gradient in the dtype of the outputs.
        total = sum(ops.sum(ops.cast(y * c, "float32")) for y, c in pairs)
        return total + sum(losses), outputs

    x = jax.ShapeDtypeStruct((n, d), layer.compute_dtype)
    tasks = case.get("tasks", 1)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    arguments = on_device((trained, x, others, [x] * tasks), case["device"])
    with replaced_dispatch(case.get("dispatch", "")):
        return step.lower(*arguments).compile()


def on_device(tensors: Any, device: str) -> Any:
    """Return the shapes of `tensors` on one chip of a TPU."""
    topology = topologies.get_topology_desc(
        f"{device}:2x2",
        platform="tpu",
        chip_config_name="default",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
        wrap=(False,) * 3,
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tensors
    )


class Outer(keras.layers.Layer):
    """A layer within another one: a bare `stateless_call` would not cast weights."""

    def __init__(self, inner: Any, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.inner = inner

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.inner(inputs, training=training)


class DenseMLP(keras.layers.Layer):
    """Two dense layers, the first one with ReLU; the same again for each level."""

    def __init__(self, hidden: int, units: int, levels: int, dtype: str) -> None:
        super().__init__(dtype=dtype)
        widths = [(hidden, "relu"), (units, None)] * levels
        self.parts = [
            keras.layers.Dense(width, activation=activation, dtype=dtype)
            for width, activation in widths
        ]

    def build(self, shape: Any) -> None:
        for part in self.parts:
            part.build(shape)
            shape = (*shape[:-1], part.units)
        self.built = True

    def call(self, inputs: Any) -> Any:
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def layer_of(case: Mapping[str, Any]) -> Any:
    """Return the layer of a case; a dense one has its `hidden` units."""
    name, d, h, dtype = (case[key] for key in ("layer", "features", "hidden", "dtype"))
    if name == "dense":
        return DenseMLP(h, d, case.get("levels", 1), dtype)
    e, units = case["experts"], (h, d)
    if name == "MMoE":
        return MMoE(e, units, case["tasks"], dtype=dtype)
    if name == "PLE":
        tasks, levels = case["tasks"], case["levels"]
        each = e // (tasks + 1)
        return PLE(levels, each, each, units, tasks, dtype=dtype)
    dispatch = case["dispatch"]
    known = dispatch if dispatch in dispatch_lib.KNOWN else "blocked"
    return MoE(e, units, case["top_k"], dispatch=known, dtype=dtype)


@contextlib.contextmanager
def replaced_dispatch(name: str) -> Iterator[None]:
    """Let "blocked" be the function of this name, if it is no dispatch of the table."""
    original = dispatch_lib.blocked
    if name == "automatic gradient":
        dispatch_lib.blocked = ragged_dot_alone
    elif name and name not in dispatch_lib.KNOWN:
        dispatch_lib.blocked = getattr(dispatch_lib, name)
    try:
        yield
    finally:
        dispatch_lib.blocked = original


def ragged_dot_alone(
    tokens: Any, routing: Any, experts: Any, training: bool | None = None
) -> Any:
    """`jax.lax.ragged_dot` with its automatic gradient: "ragged" as it was."""

    def compute(rows: Any, runs: Any) -> Any:
        m = rows.shape[0]
        ends = ops.concatenate([runs.ends[:-1], ops.full((1,), m, "int32")])
        sizes = ends - runs.starts
        row = ops.arange(m, dtype="int32")
        of_row = ops.searchsorted(ends, row, side="right")

        def matmul(rows: Any, kernel: Any, bias: Any = None, prologue: Any = None):
            rows = apply_prologue(prologue, rows)
            kernel = ops.convert_to_tensor(kernel)
            rows = jax.lax.ragged_dot(rows, kernel, sizes)
            return rows if bias is None else rows + ops.take(bias, of_row, axis=0)

        return experts.on_rows(rows, matmul, training=training)

    return in_sorted_rows(compute, tokens, routing, experts.num_experts)


@contextlib.contextmanager
def variables_without_values() -> Iterator[None]:
    """Make variables of the right shape and dtype that take no memory."""
    from keras.src.backend.jax.core import JaxVariable

    original = JaxVariable._initialize_with_initializer

    def shape_only(self: Any, initializer: Any) -> None:
        self._value = jax.ShapeDtypeStruct(tuple(self._shape), self._dtype)

    JaxVariable._initialize_with_initializer = shape_only
    try:
        yield
    finally:
        JaxVariable._initialize_with_initializer = original


if __name__ == "__main__":
    print(json.dumps(figures(json.loads(sys.argv[1]))))
