"""Export to ONNX, LiteRT and OpenVINO, with substitutions and checks."""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from keras_moe import _checks
from keras_moe import dispatch as dispatch_lib
from keras_moe._files import atomic_write, disk_error
from keras_moe.export._inference import without_metrics
from keras_moe.export._ports import (
    as_inputs,
    check_backend,
    checked_ports,
    tensor_specs,
)
from keras_moe.export._saved_model import export_saved_model
from keras_moe.layers._parts import HasDispatch

# The file extension of each format.
FORMATS = {
    "tf_saved_model": "",
    "onnx": ".onnx",
    "litert": ".tflite",
    "openvino": ".xml",
}


def export_model(model: keras.Model, path: str | Path, format: str) -> None:
    """Export `model`, or raise ValueError if the format would change its outputs.

    It calls `model.export`, replaces a dispatch of a `MoE` or `MMoE` that the format
    does not support ("blocked" by "split" in ONNX and OpenVINO, with the same outputs),
    and validates the file before moving it to `path`. The batch size is dynamic.

    OpenVINO uses bfloat16 on processors that support it, which can change the experts
    that a router chooses: compile with `{"INFERENCE_PRECISION_HINT": "f32"}`.

    Args:
        model: a functional model with named inputs and a dict of outputs by task, such
            as a `keras_moe.multitask.MultiTaskModel`.
        path: the output path; must not exist. Ends in ".onnx", ".tflite" (LiteRT) or
            ".xml" (OpenVINO, which adds a ".bin"); a folder for a SavedModel.
        format: "tf_saved_model", "onnx" (needs tf2onnx and onnx), "litert" or
            "openvino" (needs openvino).

    Raises:
        ValueError: if an argument is invalid, an input or output of the model has no
            name or a dtype that requests cannot hold, or the format does not support a
            layer or operation. Nothing is written then.
        FileExistsError: if `path` exists.
        OSError: if the disk is full or read-only. Nothing is written then.

    Example:

    >>> inputs = keras.Input((4,), name="features")
    >>> moe = keras_moe.layers.MoE(num_experts=4, expert_units=(8, 1))
    >>> model = keras.Model(inputs, {"score": moe(inputs)})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keras_moe.export.export_model(model, f"{folder}/1", "tf_saved_model")
    ...     served = keras_moe.export.load(f"{folder}/1")
    >>> served({"features": np.ones((2, 4), "float32")})["score"].shape
    (2, 1)
    """
    _checks.one_of("format", format, FORMATS)
    if format == "tf_saved_model":
        export_saved_model(model, path)
        return
    check_backend()
    features, tasks = checked_ports(model)
    both = sorted(set(features) & set(tasks))
    if both:
        raise ValueError(
            f"an input and an output of `model` must not have the same name for "
            f"format={format!r}. Received: {both[0]!r}"
        )
    path = Path(path)
    if path.suffix != FORMATS[format]:
        raise ValueError(
            f"`path` must end in {FORMATS[format]!r} for format={format!r}. "
            f"Received: path={str(path)!r}"
        )
    specs = tensor_specs(features)
    _check_layers(model, format)
    companions = [path.with_suffix(".bin")] if format == "openvino" else []
    with (
        atomic_write(path, *companions) as unfinished,
        _exportable_dispatches(model, format),
        without_metrics(model),
    ):
        try:
            model.export(
                str(unfinished),
                format=format,
                verbose=False,
                input_signature=[as_inputs(model, specs)],
                **_options(format),
            )
            _check_file(unfinished, format)
        except (ImportError, MemoryError, OSError):
            raise
        except Exception as error:
            if disk_error(error, unfinished):
                raise
            if "iostream error" in str(error):  # OpenVINO does not say which
                raise OSError(errno.EIO, "the disk is full or failed", path) from error
            raise _conversion_error(model, format, error) from error


@contextmanager
def _exportable_dispatches(model: keras.Model, format: str) -> Iterator[None]:
    """Temporarily replace the dispatches that the format does not support."""
    substitutes = dispatch_lib.substitutes(format)
    layers = [
        (layer, layer.dispatch)
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, HasDispatch) and layer.dispatch in substitutes
    ]
    try:
        for layer, dispatch in layers:
            layer.dispatch = substitutes[dispatch]
        yield
    finally:
        for layer, dispatch in layers:
            layer.dispatch = dispatch


def _check_layers(model: keras.Model, format: str) -> None:
    """Raise ValueError for layers that would convert silently to wrong outputs."""
    for layer in model._flatten_layers(include_self=False):
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                f"`model` must compute in float32 for format={format!r}: rebuild it "
                'with the dtype policy "float32" and load its weights. Received: '
                f"the layer {layer.name!r} that computes in {layer.compute_dtype}"
            )
        router = getattr(layer, "router", None)
        if format in getattr(router, "wrong_in_exports", ()):
            raise ValueError(
                f"`model` must not have a {type(router).__name__} for "
                f"format={format!r}: its outputs would differ. Use another router or "
                f'format="tf_saved_model". Received: the layer {layer.name!r} with '
                f"dispatch={layer.dispatch!r}"
            )


def _options(format: str) -> dict[str, Any]:
    if format != "litert":
        return {}
    import tensorflow as tf

    # Keras also allows TensorFlow operations, which plain LiteRT cannot run.
    return {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}


def _check_file(path: Path, format: str) -> None:
    """Raise for operations that ONNX does not define, and for incomplete weights."""
    if format == "onnx":
        import onnx

        onnx.checker.check_model(str(path))
    elif format == "openvino":
        importlib.import_module("openvino").Core().read_model(path)


def _conversion_error(model: keras.Model, format: str, error: Exception) -> ValueError:
    """Return an error with the operations of the converter's error and their layers."""
    import tensorflow as tf

    specs = tensor_specs(checked_ports(model)[0])
    traced = tf.function(
        lambda features: model(as_inputs(model, features), training=False)
    ).get_concrete_function(specs)
    graph = traced.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    mentioned = set(re.findall(r"\w+", str(error)))
    layers = {layer.name: layer for layer in model._flatten_layers(include_self=False)}
    found = {}
    for node in nodes:
        if node.op in mentioned and node.op != "NoOp":
            scopes = node.name.split("/")[::-1]
            # TensorFlow adds a number to a repeated scope.
            names = [n for s in scopes for n in (s, re.sub(r"_\d+$", "", s))]
            found[node.op] = next((layers[n] for n in names if n in layers), None)
    reasons = [f"{op}{_described(found[op])}" for op in sorted(found)]
    if not found:
        return ValueError(
            f"`model` cannot be converted to format={format!r}: {error!r}. Use "
            'format="tf_saved_model".'
        )
    reason = ", ".join(reasons)
    return ValueError(
        f"`format` must support all operations of the model, but {format!r} has no "
        f"operation for: {reason}. Change these layers, or use "
        f'format="tf_saved_model". The converter says: {_first_line(error)}'
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else repr(error)


def _described(layer: Any) -> str:
    if layer is None:
        return ""
    dispatch = getattr(layer, "dispatch", None)
    setting = f" with dispatch={dispatch!r}" if dispatch else ""
    return f" (in the layer {layer.name!r}{setting})"
