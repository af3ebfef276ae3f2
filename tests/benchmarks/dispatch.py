"""Speed of each dispatch, relative to a dense MLP with the same FLOPs.

    python -m tests.benchmarks.dispatch --fast | --regular | --large

A MoE layer of e experts (d -> h -> d, top k) is compared with Dense(k * h) -> Dense(d),
with the same compiler, in alternating calls in the same process. "step" is the forward
and backward pass of a loss, with gradients of the inputs and all weights. "share" is
the time of the MLP divided by that of the layer: 1.00 means no overhead of routing.
Memory is the increase of the peak resident memory during one step.

Every installed backend is measured in its own process.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROFILES = {
    # tokens, features, hidden, experts, rounds
    "fast": (2048, 128, 256, (4, 8, 32), 7),
    "regular": (8192, 256, 512, (4, 8, 32, 64, 128, 256), 9),
    "large": (65536, 1024, 4096, (8, 64), 9),
}


def main() -> None:
    """Run one process per backend, and print all rows as one table."""
    arguments = _parser().parse_args()
    if arguments.worker:
        _measure(arguments)
        return
    rows = []
    for backend in arguments.backends:
        if importlib.util.find_spec(backend) is None:
            continue
        command = [sys.executable, "-m", "tests.benchmarks.dispatch", *sys.argv[1:]]
        done = subprocess.run(
            [*command, "--worker", backend],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    _print(rows, arguments)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    for profile in PROFILES:
        parser.add_argument(
            f"--{profile}", dest="profile", action="store_const", const=profile
        )
    parser.set_defaults(profile="regular")
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    parser.add_argument("--experts", nargs="+", type=int, help="numbers of experts")
    parser.add_argument("--dispatch", nargs="+", help="dispatches (default: all)")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--routing", nargs="+", default=["uniform"])
    parser.add_argument("--rounds", type=int, help="alternating measurements of each")
    parser.add_argument("--out", help="JSON file to write the rows to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


# Measurement, in the process of one backend.


def _measure(arguments: argparse.Namespace) -> None:
    import keras
    import numpy as np

    keras.config.set_dtype_policy(arguments.dtype)
    n, d, h, experts, rounds = PROFILES[arguments.profile]
    k = arguments.top_k
    rounds = arguments.rounds or rounds
    rng = np.random.default_rng(0)
    x = keras.ops.convert_to_tensor(
        rng.normal(size=(n, d)).astype("float32"), dtype=keras.config.floatx()
    )
    for compiler in _compilers():
        for e in arguments.experts or experts:
            for routing in arguments.routing:
                layers = {"dense MLP": _mlp(k * h, d)}
                for dispatch in _dispatches(compiler, e):
                    if dispatch in (arguments.dispatch or [dispatch]):
                        layers[dispatch] = _moe(e, h, d, k, dispatch, routing, n)
                _report(layers, x, compiler, rounds, {"e": e, "routing": routing})


def _report(layers, x, compiler, rounds, case) -> None:
    import keras

    calls = {}
    for name, layer in layers.items():
        layer(x)
        forward, step = _compiled(layer, compiler)
        calls[name] = {"forward": forward, "step": step}
    times: dict = {name: {"forward": [], "step": []} for name in calls}
    memory = {}
    for name, kinds in calls.items():
        for call in kinds.values():
            _wait(call(x))  # Compile.
        memory[name] = _peak_rise(lambda kinds=kinds: _wait(kinds["step"](x)))
    for _ in range(rounds):
        for name, kinds in calls.items():
            for kind, call in kinds.items():
                start = time.perf_counter()
                _wait(call(x))
                times[name][kind].append(time.perf_counter() - start)
    medians = {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in times.items()
    }
    base = medians["dense MLP"]
    for name, median in medians.items():
        row = {
            "backend": keras.backend.backend(),
            "device": _device(),
            "compiler": compiler,
            **case,
            "layer": name,
            "forward_ms": 1e3 * median["forward"],
            "forward_share": base["forward"] / median["forward"],
            "step_ms": 1e3 * median["step"],
            "step_share": base["step"] / median["step"],
            "step_memory_mib": memory[name],
        }
        print(json.dumps(row), flush=True)
        share, ms = row["step_share"], row["step_ms"]
        print(
            f"{row['backend']} {compiler} e={case['e']} {case['routing']} {name}: "
            f"{ms:.0f} ms, {share:.2f}",
            file=sys.stderr,
        )


def _mlp(hidden: int, units: int):
    import keras

    return keras.Sequential(
        [keras.layers.Dense(hidden, activation="relu"), keras.layers.Dense(units)]
    )


def _moe(e, h, d, k, dispatch, routing, n):
    import keras
    import numpy as np

    import keras_moe

    class FixedRouter(keras_moe.routers.TopKRouter):
        """A top-k router, at full cost, whose choices follow a given distribution."""

        def _logits(self, tokens):
            return super()._logits(tokens) * 1e-3 + self.offsets

    rng = np.random.default_rng(1)
    probs = {
        "uniform": np.ones(e),
        "zipf": 1.0 / np.arange(1, e + 1),
        "one": np.exp(-100.0 * np.arange(e)),  # All tokens to experts 0 to k - 1.
    }[routing]
    # The k largest of log p + Gumbel noise are k draws without replacement from p.
    offsets = np.log(probs + 1e-300) + rng.gumbel(size=(n, e))
    router = FixedRouter(num_experts=e, top_k=k, name="router")
    router.offsets = keras.ops.convert_to_tensor(offsets.astype("float32"))
    capacity = {"capacity_factor": 1.25} if dispatch == "capacity" else {}
    return keras_moe.layers.MoE(
        num_experts=e,
        expert_units=(h, d),
        top_k=k,
        router=router,
        dispatch=dispatch,
        load_balancing_loss_weight=0.0,
        **capacity,
    )


def _compilers() -> list[str]:
    import keras

    return {
        "tensorflow": ["graph", "XLA"],
        "jax": ["XLA"],
        "torch": ["eager"],
    }[keras.backend.backend()]


def _dispatches(compiler: str, e: int) -> list[str]:
    dropless = ["blocked"] if compiler == "XLA" else ["split"]
    dense = ["dense"] if e <= 8 else []  # Too slow for more experts.
    return [*dropless, "capacity", *dense]


def _compiled(layer, compiler):
    """Return the compiled forward pass and training step of a layer."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(tf.square(tf.cast(layer(x), tf.float32)))
            weights = [w.value for w in layer.trainable_variables]
            return tape.gradient(loss, [x, *weights])

        jit = compiler == "XLA"
        return (
            tf.function(lambda x: layer(x), jit_compile=jit),
            tf.function(step, jit_compile=jit),
        )
    if backend == "jax":
        import jax
        import jax.numpy as jnp

        weights = [w.value for w in layer.trainable_variables]
        fixed = [w.value for w in layer.non_trainable_variables]

        def apply(weights, x):
            return layer.stateless_call(weights, fixed, x)[0]

        def loss(weights, x):
            return jnp.sum(jnp.square(apply(weights, x).astype("float32")))

        forward, step = jax.jit(apply), jax.jit(jax.grad(loss, argnums=(0, 1)))
        return (lambda x: forward(weights, x)), (lambda x: step(weights, x))
    import torch

    def forward_torch(x):
        with torch.no_grad():
            return layer(x)

    def step_torch(x):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        layer(x).float().square().sum().backward()
        return x.grad

    return forward_torch, step_torch


def _wait(outputs) -> None:
    """Wait until the device has finished, by reading the last output."""
    import keras

    last = keras.tree.flatten(outputs)[-1]
    if hasattr(last, "block_until_ready"):
        last.block_until_ready()
    else:
        keras.ops.convert_to_numpy(keras.ops.sum(last))


def _peak_rise(call) -> float | None:
    """Return by how many MiB one call raises the peak resident memory."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None

    def field(name):
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) / 1024

    try:
        # Return freed memory to the system; otherwise it would be reused unnoticed.
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # Resets the peak to the current value.
    except (OSError, AttributeError):
        return None
    before = field("VmRSS")
    call()
    return field("VmHWM") - before


def _device() -> str:
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        return gpus[0].name if gpus else "cpu"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# The table.


def _print(rows: list[dict], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    n, d, h, _, rounds = PROFILES[arguments.profile]
    table = Table(
        title=f"n={n}, d={d}, h={h}, k={arguments.top_k}, {arguments.dtype}, "
        f"median of {arguments.rounds or rounds}, {os.cpu_count()} CPU cores"
    )
    for column in ("backend", "compiler", "e", "routing", "layer"):
        table.add_column(column)
    for column in ("forward ms", "share", "step ms", "share", "memory MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        memory = row["step_memory_mib"]
        table.add_row(
            f"{row['backend']} ({row['device']})",
            row["compiler"],
            str(row["e"]),
            row["routing"],
            row["layer"],
            f"{row['forward_ms']:.1f}",
            f"{row['forward_share']:.2f}",
            f"{row['step_ms']:.1f}",
            f"{row['step_share']:.2f}",
            "" if memory is None else f"{memory:.0f}",
            end_section=row is rows[-1],
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
