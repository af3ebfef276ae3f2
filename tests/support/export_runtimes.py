"""A file of each export format as a function: features by name to tasks by name.

Each runtime is imported where it runs: none of them is needed by the library.
"""

from pathlib import Path

import numpy as np


def runner(path: Path, format: str):
    """Load the file once and return a function of (n, 8) `features`."""
    return _RUNTIMES[format](str(path))


def _saved_model(path):
    from keras_moe import export

    served = export.load(path)
    return lambda x: served({"features": x})


def _onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    tasks = [output.name for output in session.get_outputs()]

    def run(x):
        return dict(zip(tasks, session.run(tasks, {"features": x}), strict=True))

    return run


def _litert(path):
    from ai_edge_litert.interpreter import Interpreter

    served = Interpreter(path).get_signature_runner("serving_default")
    return lambda x: served(features=x)


def _openvino(path):
    import openvino

    # Some processors would compute in bfloat16, with which a router may choose others.
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(x):
        found = compiled({"features": x}).to_dict()
        tasks = ("click", "stars", "score")
        return {
            name: np.array(value)
            for port, value in found.items()
            for name in tasks
            if name in port.names
        }

    return run


_RUNTIMES = {
    "tf_saved_model": _saved_model,
    "onnx": _onnx,
    "litert": _litert,
    "openvino": _openvino,
}
