"""Collectives of a training step on eight devices, counted in the compiled program.

    python -m tests.benchmarks.collectives            # prints the table
    python -m tests.benchmarks.collectives --rows 65536 --features 1024
    python -m tests.benchmarks.collectives --tpu v5e:2x2 --dtype mixed_bfloat16

The last one compiles for chips of a TPU and needs `libtpu`, no TPU. The step is a
sparse mixture, its gradients by weights and by inputs; nothing is run.
"XLA alone" is the same layer without `jax.shard_map`. FLOPs are those that the compiler
counts for a device, against those of one device / 8. It counts the body of a loop once:
for `blocked_in_turn` the table has the rows that the loop multiplies for a uniform
routing, by the fullest device, against the choices / 8. "sent" is by a device, in a
ring.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

Mesh = tuple[dict[str, int], str | None]
DISPATCHES = ("blocked_in_turn", "blocked_evenly", "capacity", "expert_choice")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "f16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
# "replica_groups=mesh['a'=2,'b'=4] {'a'}": groups along these axes.
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective: its result, and what a device sends in a ring for it, in bytes."""

    kind: str
    result: int
    sent: float


class Step(NamedTuple):
    """The figures of a compiled step, on a device."""

    collectives: list[Collective]
    flops: float
    arguments: int
    temporary: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(found.sent for found in self.collectives)


def collectives(text: str) -> list[Collective]:
    """Return the collectives of an HLO text.

    >>> collectives("%a = f32[4,2]{1,0} all-reduce(%b), replica_groups=[1,8]<=[8]")
    [Collective(kind='all-reduce', result=32, sent=56.0)]
    """
    found = []
    # Groups that are left out have all devices.
    devices = re.search(r"num_partitions=(\d+)", text)
    count = int(devices.group(1)) if devices else 1
    for line in text.splitlines():
        match = _INSTRUCTION.search(line)
        if match is None:
            continue
        shape, kind, start = match.groups()
        arrays = [
            math.prod(int(n) for n in dims.split(",") if n) * _BYTES[dtype]
            for dtype, dims in _ARRAY.findall(shape)
            if dtype in _BYTES
        ]
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # Operands come first.
        size = sum(arrays)
        found.append(Collective(kind, size, size * _factor(kind, line, count)))
    return found


def _factor(kind: str, line: str, devices: int) -> float:
    """Return the bytes that each of the g devices of a ring sends, per byte."""
    groups, axes = _GROUPS.search(line), _AXES.search(line)
    g = devices
    if groups is not None:
        iota, listed = groups.groups()
        g = int(iota) if iota else len(listed.split(","))
    elif axes is not None:
        sizes = dict(_AXIS.findall(axes.group(1)))
        g = math.prod(
            int(sizes[name]) for name in re.findall(r"'(\w+)'", axes.group(2))
        )
    factors = {
        "all-reduce": 2 * (g - 1) / g,
        "all-gather": (g - 1) / g,
        "reduce-scatter": g - 1,
        "all-to-all": (g - 1) / g,
    }
    return factors.get(kind, 1.0)


def summarized(compiled: Any) -> Step:
    """Return the figures of a compiled program."""
    memory = compiled.memory_analysis()
    return Step(
        collectives(compiled.as_text()),
        compiled.cost_analysis()["flops"],
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )


def distribution(
    layer: Any, sizes: Mapping[str, int], axis: str | None, devices: Any = None
) -> Any:
    """Return the distribution of a mesh."""
    from keras.distribution import DataParallel, DeviceMesh

    from keras_moe.distribution import expert_parallel

    mesh = DeviceMesh(tuple(sizes.values()), list(sizes), devices)
    if axis is None:
        return DataParallel(mesh)
    return expert_parallel(layer, mesh, expert_axis=axis)


def compiled_step(
    layer: Any, active: Any, shape: tuple[int, ...], device: Any = None
) -> Any:
    """Return the program of the gradients of `layer` under a distribution.

    Without one it is for `device`.
    """
    import jax
    import keras

    def placed(shape: Any, dtype: Any, layout: Any) -> Any:
        sharding = None if layout is None else layout.backend_layout
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def of(variable: Any) -> Any:
        layout = active and active.get_variable_layout(variable)
        return placed(variable.shape, variable.dtype, layout)

    def step(trained: Any, fixed: Any, x: Any) -> Any:
        def loss(trained: Any, x: Any) -> Any:
            outputs, _, losses = layer.stateless_call(
                trained, fixed, x, training=True, return_losses=True
            )
            return (outputs.astype("float32") ** 2).mean() + sum(losses)

        return jax.grad(loss, argnums=(0, 1))(trained, x)

    trained = [of(v) for v in layer.trainable_variables]
    fixed = [of(v) for v in layer.non_trainable_variables]
    layout = active and active.get_data_layout(shape)
    x = placed(shape, layer.layers[-1].compute_dtype, layout)
    if device is not None:
        alone = jax.sharding.SingleDeviceSharding(device)
        trained, fixed, x = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=alone),
            (trained, fixed, x),
        )
    outputs = None
    if active is not None:
        outputs = [v.sharding for v in trained], x.sharding
    keras.distribution.set_distribution(active)
    try:
        return jax.jit(step, out_shardings=outputs).lower(trained, fixed, x).compile()
    finally:
        keras.distribution.set_distribution(None)


def meshes(devices: int) -> dict[str, Mesh]:
    """Return meshes by name: the sizes of the axes, and the axis of the experts."""
    half = devices // 2
    return {
        f"data ({devices})": ({"batch": devices}, None),
        f"experts on the batch's axis ({devices})": ({"batch": devices}, "batch"),
        f"experts on their own axis (2, {half})": (
            {"batch": 2, "expert": half},
            "expert",
        ),
        f"experts on their own axis (1, {devices})": (
            {"batch": 1, "expert": devices},
            "expert",
        ),
    }


def mixture(dispatch: str, features: int, hidden: int, dtype: str = "float32") -> Any:
    """Return a model of 8 experts, 2 of them a row, with this dispatch."""
    import keras

    from keras_moe.layers import MoE

    class Mixture(MoE):
        def _resolve_dispatch(self) -> str:
            return "capacity" if dispatch == "expert_choice" else dispatch

    router = "expert_choice" if dispatch == "expert_choice" else "top_k"
    layer = Mixture(8, (hidden, features), router=router, dtype=dtype)
    # In a model: `stateless_call` of a layer alone does not cast its weights.
    return keras.Sequential([keras.Input((features,)), layer])


def without_shard_map(step: Callable[[], Any]) -> Any:
    """Return `step()`, with the dispatch left to XLA's partitioner."""
    from keras_moe import dispatch

    kept = dispatch.on_devices
    dispatch.on_devices = lambda compute, *arguments, **options: compute(
        *arguments, **options
    )
    try:
        return step()
    finally:
        dispatch.on_devices = kept


def rows_in_turn(rows: int, mesh: Mesh, devices: int) -> float:
    """Return the rows that the loops of the fullest device multiply, of its share.

    Args:
        rows: the rows of a batch, which choose 2 of 8 experts each, at random.
        mesh: the sizes of the axes, and the axis of the experts.
        devices: number of devices that share the choices.
    """
    import numpy as np

    from keras_moe.dispatch import _even, rows_multiplied

    sizes, axis = mesh
    parts = 1 if axis is None else sizes[axis]
    visible = rows if axis == "batch" else rows // sizes["batch"]
    e, mean, room = 8 // parts, 2 * visible // parts, 2 * visible
    if parts > 1:
        room = e * _even.slots_per_expert(mean, e, _even.rows_per_turn(mean, e))
    choices = np.random.default_rng(0).integers(0, 8, 2 * visible)
    counts = np.bincount(choices, minlength=8).reshape(parts, e)
    most = max(rows_multiplied(own, min(room, 2 * visible)) for own in counts)
    return most / (2 * rows / devices)


def row(
    name: str, dispatch: str, step: Step, one: Step, devices: int, rows: int, mesh: Mesh
) -> str:
    """Return a row of the table."""
    kinds = Counter(found.kind for found in step.collectives)
    shown = ", ".join(
        f"{count} {kind} "
        f"{sum(c.result for c in step.collectives if c.kind == kind) / 1e6:.2f}"
        for kind, count in sorted(kinds.items())
    )
    flops = f"{step.flops / (one.flops / devices):.2f}"
    if dispatch == "blocked_in_turn":
        flops = f"rows: {rows_in_turn(rows, mesh, devices):.2f}"
    return (
        f"| {name} | {dispatch} | {shown or 'none'} | {step.sent / 1e6:.2f} | {flops} "
        f"| {step.arguments / 1e6:.2f} | {step.temporary / 1e6:.2f} |"
    )


def table(given: argparse.Namespace, devices: Sequence[Any] | None) -> Iterator[str]:
    """Yield the lines of the table; `devices` are those of a TPU, or None."""
    count = 8 if devices is None else len(devices)
    yield (
        "| mesh | dispatch | collectives: count, kind, MB of the results | sent, MB "
        f"| FLOPs, of one device / {count} | arguments, MB | temporary, MB |"
    )
    yield "|---|---|---|---|---|---|---|"
    for dispatch in given.dispatch:
        layer = mixture(dispatch, given.features, given.hidden, given.dtype)
        shape = (given.rows, given.features)
        first = None if devices is None else devices[0]
        one = summarized(compiled_step(layer, None, shape, first))
        undivided: Mesh = {"batch": 1}, None
        yield row("one device", dispatch, one, one, count, given.rows, undivided)
        for name, mesh in meshes(count).items():
            sizes, axis = mesh
            active = distribution(layer, sizes, axis, devices)
            compile_ = partial(compiled_step, layer, active, shape)
            if axis is None:
                plain = summarized(without_shard_map(compile_))
                alone = f"{name}, XLA alone"
                yield row(alone, dispatch, plain, one, count, given.rows, undivided)
            step = summarized(compile_())
            yield row(name, dispatch, step, one, count, given.rows, mesh)


def tpu_devices(topology: str) -> list[Any]:
    """Return the chips of a topology such as "v5e:2x2", without a TPU."""
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(
            topology,
            platform="tpu",
            chip_config_name="default",
            chips_per_host_bounds=(2, 2, 1),
            num_slices=1,
            wrap=(False,) * 3,
        ).devices
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dispatch", nargs="+", default=DISPATCHES)
    parser.add_argument("--tpu")
    given = parser.parse_args()
    os.environ |= {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        "--xla_force_host_platform_device_count=8",
    }
    for line in table(given, given.tpu and tpu_devices(given.tpu)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
