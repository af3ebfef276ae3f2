"""What XLA's compiler for NVIDIA GPUs makes of a dispatch, without a GPU.

python -m tests.benchmarks.gpu_programs [--experts 8 64] [--rows 65536]

Needs the wheels `jax-cuda12-plugin` and `jax-cuda12-pjrt` of JAX's own version, without
CUDA (`pip install --no-deps`). Nothing is run: there are no times here.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from typing import Any

# Before JAX is imported. The versions of CUDA's libraries, of which there are none
# here, need no check.
SETTINGS = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cuda,cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# An H100 SXM, as NVIDIA describes it.
H100 = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
WIDTH, HIDDEN, TOP_K, DTYPE = 1024, 4096, 2, "bfloat16"
BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def main() -> None:
    """Print a table: FLOPs, bytes and temporary memory of forward and backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rows", type=int, default=65536)
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ[name] = value
    from keras_moe import dispatch

    sharding = on_h100()
    print("| | TFLOP | bytes of kernels | temporary memory | loops |")
    print("|---|---|---|---|---|")
    _print_row("dense MLP of equal active FLOPs", mlp(options.rows, sharding))
    for e in options.experts:
        program = mixture(dispatch.blocked_evenly, options.rows, e, sharding)
        _print_row(f"`blocked_evenly`, e = {e}", program)


def on_h100() -> Any:
    """Return a sharding over one H100 that does not exist."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100
    )
    mesh = jax.sharding.Mesh(np.array(described.devices[:1]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def mixture(move: Any, n: int, e: int, sharding: Any = None) -> Any:
    """Lower value and gradients of experts behind a dispatch."""
    from keras_moe.experts import MLPExperts
    from keras_moe.routing import Routing

    experts = MLPExperts(e, (HIDDEN, WIDTH), dtype=DTYPE)
    experts.built = True

    def loss(kernels: Any, biases: Any, tokens: Any, weights: Any, fixed: Any) -> Any:
        indices, cotangent = fixed
        experts.kernels, experts.biases = kernels, biases
        outputs = move(tokens, Routing(indices, weights), experts)
        return (outputs * cotangent).astype("float32").sum()

    return _lowered(
        loss,
        sharding,
        [(e, WIDTH, HIDDEN), (e, HIDDEN, WIDTH)],
        [(e, HIDDEN), (e, WIDTH)],
        (n, WIDTH),
        (n, TOP_K),
        ((n, TOP_K, "int32"), (n, WIDTH)),
    )


def mlp(n: int, sharding: Any = None) -> Any:
    """Lower the same of one MLP, as wide as the experts of a token together."""
    import jax

    def loss(kernels: Any, biases: Any, tokens: Any, cotangent: Any) -> Any:
        hidden = jax.nn.relu(tokens @ kernels[0] + biases[0])
        outputs = (hidden @ kernels[1] + biases[1]) * cotangent
        return outputs.astype("float32").sum()

    h = TOP_K * HIDDEN
    return _lowered(
        loss, sharding, [(WIDTH, h), (h, WIDTH)], [(h,), (WIDTH,)], *[(n, WIDTH)] * 2
    )


def _lowered(loss: Any, sharding: Any, *shapes: Any) -> Any:
    import jax

    def tensor(shape: Any) -> Any:
        if isinstance(shape, list) or isinstance(shape[0], tuple):
            return type(shape)(tensor(part) for part in shape)
        *sizes, dtype = shape if isinstance(shape[-1], str) else (*shape, DTYPE)
        return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)

    by = tuple(range(len(shapes) - 1))
    return jax.jit(jax.value_and_grad(loss, by)).lower(*map(tensor, shapes))


def _print_row(label: str, lowered: Any) -> None:
    program = lowered.compile()
    text = program.as_text()
    memory = program.memory_analysis().temp_size_in_bytes
    print(
        f"| {label} | {flops(text) / 1e12:.2f} | {kernel_bytes(text) / 1e9:.1f} GB "
        f"| {memory / 1e9:.2f} GB | {len(re.findall(r' while[(]', text))} |",
        flush=True,
    )


_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")


def kernel_bytes(text: str) -> int:
    """Return the bytes that kernels outside loops read and write.

    Operands count whole, also where a kernel gathers some of their rows.
    """
    sizes, total = {}, 0
    for line in text[text.index("\nENTRY") :].splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, operation, operands = found.groups()
        sizes[name] = _size(shape)
        if operation in ("fusion", "custom-call", "copy", "dot", "reduce", "sort"):
            parts = [sizes.get(part.strip(" %"), 0) for part in operands.split(",")]
            total += sizes[name] + sum(parts)
    return total


def flops(text: str) -> float:
    """Return the operations of all matmuls; the body of a loop counts once."""
    shapes = {
        (computation, name): shape
        for computation, name, shape, *_ in _instructions(text)
    }
    total = 0.0
    for computation, _, shape, operation, operands, line in _instructions(text):
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", line)
        if operation != "dot" or not contracted:
            continue
        left = shapes[computation, operands.split(",")[0].strip(" %")]
        inner = [_dims(left)[int(axis)] for axis in contracted.group(1).split(",")]
        total += 2.0 * math.prod(_dims(shape)) * math.prod(inner)
    return total


def _instructions(text: str) -> list[tuple[str, ...]]:
    computation, rows = "", []
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found:
            rows.append((computation, *found.groups(), line))
        elif line.endswith("{"):
            computation = line.split("(")[0].strip()
    return rows


def _dims(shape: str) -> list[int]:
    inside = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in inside.group(1).split(",") if size] if inside else []


def _size(shape: str) -> int:
    return sum(
        BYTES.get(dtype, 4) * math.prod(_dims(f"[{sizes}]"))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


if __name__ == "__main__":
    main()
