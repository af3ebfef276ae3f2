"""Models in ONNX, LiteRT and OpenVINO: what is substituted, checked and refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from keras_moe import _checks, routers
from keras_moe import dispatch as dispatch_lib
from keras_moe.export._files import whole
from keras_moe.export._ports import (
    as_inputs,
    check_backend,
    checked_ports,
    tensor_specs,
)
from keras_moe.export._saved_model import export_saved_model

# The end of a file's name in every format.
FORMATS = {
    "tf_saved_model": "",
    "onnx": ".onnx",
    "litert": ".tflite",
    "openvino": ".xml",
}
# What a converter turns into other numbers: OpenVINO's integers do not wrap around.
_CHANGED_ROUTERS = {"openvino": routers.HashRouter}


def export_model(model: keras.Model, path: str | Path, format: str) -> None:
    """Write `model` in a format that gives the outputs of the model, or refuse.

    This is `model.export`, with the dispatch of a `MoE` or `MMoE` changed for the file
    where the format cannot carry it ("blocked" becomes "split" in ONNX and OpenVINO,
    with the same outputs), and with a look at the file before it appears. One file
    takes any batch size.

    OpenVINO computes in bfloat16 where the processor can, with which a router may
    choose other experts: compile with `{"INFERENCE_PRECISION_HINT": "f32"}`.

    Args:
        model: a functional model with named inputs and a dict of outputs by task, such
            as a `keras_moe.multitask.MultiTaskModel`.
        path: where to write; must not exist. Ends in ".onnx", ".tflite" (LiteRT) or
            ".xml" (OpenVINO, with a ".bin" beside it); a folder for a SavedModel.
        format: "tf_saved_model", "onnx" (needs tf2onnx and onnx), "litert" or
            "openvino" (needs openvino).

    Raises:
        ValueError: if an argument breaks its rule, if a server could mistake an input
            or output of the model (no name, or a dtype that requests do not have), or
            if the format has no such layer or operation. Nothing is written then.
        FileExistsError: if there is something at `path`.

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
            f"an input and an output of `model` must not have one name for format="
            f"{format!r}. Received: {both[0]!r}"
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
    with whole(path, *companions) as unfinished, _dispatches(model, format):
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
            raise _refusal(model, format, error) from error


@contextmanager
def _dispatches(model: keras.Model, format: str) -> Iterator[None]:
    """Give the layers of `model` dispatches that the format can carry, for a while."""
    substitutes = dispatch_lib.substitutes(format)
    layers = [
        (layer, layer.dispatch)
        for layer in model._flatten_layers(include_self=False)
        if getattr(layer, "dispatch", None) in substitutes
    ]
    try:
        for layer, dispatch in layers:
            layer.dispatch = substitutes[dispatch]
        yield
    finally:
        for layer, dispatch in layers:
            layer.dispatch = dispatch


def _check_layers(model: keras.Model, format: str) -> None:
    """Refuse what would be converted without an error, and not be the same."""
    for layer in model._flatten_layers(include_self=False):
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                f"`model` must compute in float32 for format={format!r}: make it again "
                'under the dtype policy "float32" and load its weights. Received: '
                f"the layer {layer.name!r} that computes in {layer.compute_dtype}"
            )
        router = getattr(layer, "router", None)
        if isinstance(router, _CHANGED_ROUTERS.get(format, ())):
            raise ValueError(
                f"`model` must have no {type(router).__name__} for format={format!r}, "
                "whose outputs would differ. Use another router or "
                f'format="tf_saved_model". Received: the layer {layer.name!r} with '
                f"dispatch={layer.dispatch!r}"
            )


def _options(format: str) -> dict[str, Any]:
    if format != "litert":
        return {}
    import tensorflow as tf

    # Keras would let the file hold operations that only TensorFlow's own build runs.
    return {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}


def _check_file(path: Path, format: str) -> None:
    """Refuse what tf2onnx writes although ONNX has no such operation."""
    if format == "onnx":
        import onnx

        onnx.checker.check_model(str(path))


def _refusal(model: keras.Model, format: str, error: Exception) -> ValueError:
    """Name the operations that the converter did, and the layers that they are of."""
    import tensorflow as tf

    specs = tensor_specs(checked_ports(model)[0])
    traced = tf.function(
        lambda features: model(as_inputs(model, features), training=False)
    ).get_concrete_function(specs)
    graph = traced.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    said = set(re.findall(r"\w+", str(error)))
    layers = {layer.name: layer for layer in model._flatten_layers(include_self=False)}
    found = {}
    for node in nodes:
        if node.op in said and node.op != "NoOp":
            scopes = node.name.split("/")[::-1]
            # A scope that is there a second time gets a number.
            names = [n for s in scopes for n in (s, re.sub(r"_\d+$", "", s))]
            found[node.op] = next((layers[n] for n in names if n in layers), None)
    reasons = [f"{op}{_described(found[op])}" for op in sorted(found)]
    if not found:
        return ValueError(
            f"`model` could not be converted to format={format!r}: {error!r}. Use "
            'format="tf_saved_model".'
        )
    reason = ", ".join(reasons)
    return ValueError(
        f"`format` must be one that can hold the whole model, and {format!r} has no "
        f"operation for: {reason}. Change these layers, or use "
        'format="tf_saved_model".'
    )


def _described(layer: Any) -> str:
    if layer is None:
        return ""
    dispatch = getattr(layer, "dispatch", None)
    setting = f" with dispatch={dispatch!r}" if dispatch else ""
    return f" (in the layer {layer.name!r}{setting})"
