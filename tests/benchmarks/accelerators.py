"""The command of the figures for TPU, from its compiler: no TPU is needed.

python -m tests.benchmarks.accelerators [--json FILE] [--only TEXT]
python -m tests.benchmarks.accelerators page FILE.json

The first form compiles the cases that FILE does not have yet, one after the other, in
the environment "tpu" (`python -m tests.benchmarks setup tpu`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.environments import ROOT, python_of

DEVICES = ("v5e", "v6e")
NAMES = {
    "dense": "dense MLP of equal FLOPs",
    "ragged": '"ragged", the "auto" of JAX',
    "automatic gradient": '"ragged" before: `ragged_dot`, automatic gradient',
    "blocked_evenly": '"blocked", evenly',
    "capacity": '"capacity"',
}
COMMON = {
    "rows": 65536,
    "features": 1024,
    "hidden": 4096,
    "top_k": 2,
    "dtype": "mixed_bfloat16",
}
# With kernels in float32, e = 256 needs more memory than a v5e has.
WEIGHTS_IN_HALF = {"dtype": "bfloat16"}
VARIABLES = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def cases() -> list[dict[str, Any]]:
    """Return the cases, the most important ones first."""
    found = []
    for device in DEVICES:
        found += [case | {"device": device} for case in _cases_of_a_device()]
    return found


def _cases_of_a_device() -> list[dict[str, Any]]:
    hidden = COMMON["top_k"] * COMMON["hidden"]
    dense = COMMON | {"layer": "dense", "hidden": hidden}
    moe = COMMON | {"layer": "MoE", "dispatch": "ragged"}
    found = [dense, *[moe | {"experts": e} for e in (8, 64)]]
    found += [dense | WEIGHTS_IN_HALF, moe | {"experts": 256} | WEIGHTS_IN_HALF]
    found += [moe | {"experts": e, "dispatch": "capacity"} for e in (8, 64)]
    found += [moe | {"experts": 8, "dispatch": "automatic gradient"}]
    found += [moe | {"experts": 8, "dispatch": "blocked_evenly"}]
    # All experts compute all rows: 8 of 1024 hidden units, or 2 levels of 6.
    mixture = COMMON | {"hidden": 1024, "tasks": 2}
    found += [
        mixture | {"layer": "dense", "hidden": 8 * 1024, "tasks": 1},
        mixture | {"layer": "MMoE", "experts": 8},
        mixture | {"layer": "dense", "hidden": 6 * 1024, "tasks": 1, "levels": 2},
        mixture | {"layer": "PLE", "experts": 6, "levels": 2},
    ]
    unique: list[dict[str, Any]] = []
    for case in found:
        if not any(label(case) == label(other) for other in unique):
            unique.append(case)
    return unique


def label(case: Mapping[str, Any]) -> str:
    """Return a case as a line of text, the same for equal programs."""
    keys = ("device", "layer", "dispatch", "experts", "levels", "hidden", "dtype")
    return ", ".join(f"{key} = {case[key]}" for key in keys if key in case)


def counterpart(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dense case of the same device, FLOPs and dtype."""
    chosen = case["top_k"] if case["layer"] == "MoE" else case["experts"]
    levels = {"levels": case["levels"]} if "levels" in case else {}
    return {
        **{key: case[key] for key in (*COMMON, "device")},
        "layer": "dense",
        "hidden": chosen * case["hidden"],
        **levels,
    }


def compile_case(case: Mapping[str, Any], python: Path) -> dict[str, Any]:
    """Return the figures of a case, or {"error": ...} if it cannot be compiled."""
    done = subprocess.run(
        [str(python), "-m", "tests.benchmarks.tpu_programs", json.dumps(case)],
        cwd=ROOT,
        env={**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error" in line]
    return {"error": (told or lines or ["no message"])[-1].strip()[:300]}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results by label, each {"case": ..., "figures": ...}."""
    return json.loads(path.read_text()) if path.exists() else {}


def run(options: argparse.Namespace) -> int:
    """Compile what is missing; keep each result at once. Return 1 if a case failed."""
    python = options.python or python_of("tpu")
    if python is None:
        raise ValueError(
            "no environment has libtpu: run `python -m tests.benchmarks setup tpu` "
            "first, or pass --python"
        )
    chosen = {label(case): case for case in cases() if options.only in label(case)}
    if not chosen:
        raise ValueError(
            f"--only must be a part of a case's name; got {options.only!r}"
        )
    results = read(options.json)
    for name, case in chosen.items():
        if name not in results or "error" in results[name]["figures"]:
            results[name] = {"case": case, "figures": compile_case(case, python)}
            kept = json.dumps(results, indent=1) + "\n"
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(kept)
        print(name, results[name]["figures"], flush=True)
    return int(any("error" in results[name]["figures"] for name in chosen))


def page(options: argparse.Namespace) -> int:
    """Write the page and its picture."""
    from tests.benchmarks.accelerators_page import PICTURE, markdown, png

    results = read(options.file)
    if not results:
        raise ValueError(f"{options.file} has no results")
    written = {"accelerators.md": markdown(results).encode(), PICTURE: png(results)}
    for name, content in written.items():
        path = options.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"wrote {path}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in ("run", "page", "-h", "--help"):
        arguments = ["run", *arguments]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.accelerators",
        description="What the compiler of a TPU says. Without a command: run.",
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="compile (the default)")
    command.set_defaults(work=run)
    default = ROOT / ".benchmarks" / "accelerators.json"
    command.add_argument(
        "--json",
        type=Path,
        default=default,
        metavar="FILE",
        help="the results; what it has already is not compiled again "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--only", default="", metavar="TEXT", help="cases with this text in their name"
    )
    command.add_argument(
        "--python", type=Path, help="an interpreter with libtpu, JAX and Keras"
    )
    command = commands.add_parser("page", help="write the page of the documentation")
    command.set_defaults(work=page)
    command.add_argument("file", type=Path, metavar="FILE.json", help="from --json")
    docs = ROOT / "docs"
    command.add_argument("--docs", type=Path, default=docs, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        return options.work(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
