"""ONNX, LiteRT and OpenVINO files with a flipped bit: what the runtimes notice.

These formats have no checksums. A damaged file may end the process of its runtime, so
each is run in another one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.robustness.damage import copied, damage, judged
from tests.robustness.read_cases import Case

ROOT = Path(__file__).parents[2]
FILES = {"onnx": "1.onnx", "litert": "1.tflite", "openvino": "1.xml"}
_ROWS = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)


def _outputs(path: str, format: str) -> list[list[float]]:
    """Return the outputs of a file in its runtime."""
    if format == "onnx":
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(["score"], {"features": _ROWS})
    elif format == "litert":
        from ai_edge_litert.interpreter import Interpreter

        served = Interpreter(path).get_signature_runner("serving_default")
        found = served(features=_ROWS)["score"]
    else:
        import openvino

        compiled = openvino.Core().compile_model(
            path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        found = compiled({"features": _ROWS})[compiled.output("score")]
    return np.asarray(found).tolist()


class Runtimes:
    """A process that runs files, started again after a file has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, path: Path, format: str) -> list[list[float]] | str:
        """Return the outputs, or the error of the runtime."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.robustness.unchecked_cases"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                text=True,
            )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(path), format]) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("RESULT "):
                return json.loads(line[7:])
        return f"the process ended with {self._process.wait()}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()


def flipped_bits(
    scratch: Path, rng: random.Random, format: str, runtimes: Runtimes
) -> Iterator[Case]:
    """A bit flipped: an error of the runtime, or the same outputs."""
    import keras

    import keras_moe
    from keras_moe import export

    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="features")
    # Wide experts: as in a real model, most of the file is weights.
    mixed = keras_moe.layers.MoE(num_experts=3, expert_units=(64, 64, 1))(inputs)
    source = scratch / format
    model = keras.Model(inputs, {"score": mixed})
    export.export_model(model, source / FILES[format], format)
    expected = runtimes.run(source / FILES[format], format)
    if isinstance(expected, str):
        raise RuntimeError(f"the whole file fails: {expected}")

    def case() -> str | None:
        with copied(source, scratch / "copy") as copy:
            path = rng.choice(sorted(copy.iterdir()))
            done = damage(path, "flipped bit", rng)
            found = runtimes.run(copy / FILES[format], format)
        if isinstance(found, str):
            judged.append(found)
            return None
        if np.array_equal(found, expected):
            return None
        return f"{done}: other outputs"

    while True:
        yield case


def _serve() -> None:
    for line in sys.stdin:
        path, format = json.loads(line)
        try:
            found: object = _outputs(path, format)
        except Exception as error:
            found = f"{type(error).__name__}"
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _serve()
