"""Models for servers: SavedModel, ONNX, LiteRT and OpenVINO.

`keras.Model.export` writes all four. This room adds what it lacks: a mixture takes the
dispatch that a format can carry, a file that its runtime could not run is refused, and
a SavedModel has a signature for every task, takes raw features, warms a server up and
names the feature that is wrong. Only the TensorFlow backend exports; a `.keras` file
brings a model there from any other.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_moe import _backend, _checks, _requests, routers

# The end of a file's name in every format.
FORMATS = {
    "tf_saved_model": "",
    "onnx": ".onnx",
    "litert": ".tflite",
    "openvino": ".xml",
}
# "blocked" writes into its rows in a loop, for which these two have no operation.
_INSTEAD = {"onnx": {"blocked": "split"}, "openvino": {"blocked": "split"}}
# What a converter turns into other numbers: OpenVINO's integers do not wrap around.
_OTHERWISE = {"openvino": routers.HashRouter}
# What a request can hold in JSON and in NumPy.
_DTYPES = (
    *("bool", "string", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
# What Keras calls a tensor without a name; the number changes from run to run.
_UNNAMED = re.compile(r"(keras_tensor|input|input_layer|output)(_\d+)?")
_RESERVED = ("serve", "serving_default", "variables", "signatures")


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
    _check_backend()
    features, tasks = _checked_ports(model)
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
    specs = _tensor_specs(features)
    _check_layers(model, format)
    companions = [path.with_suffix(".bin")] if format == "openvino" else []
    with _whole(path, *companions) as unfinished, _dispatches(model, format):
        try:
            model.export(
                str(unfinished),
                format=format,
                verbose=False,
                input_signature=[_as_inputs(model, specs)],
                **_options(format),
            )
            _check_file(unfinished, format)
        except (ImportError, MemoryError, OSError):
            raise
        except Exception as error:
            raise _refusal(model, format, error) from error


def export_saved_model(
    model: keras.Model,
    path: str | Path,
    *,
    preprocessing: Any = None,
    warmup: Sequence[Mapping[str, Any]] = (),
    refuse_nan: bool = True,
) -> None:
    """Write a SavedModel that TensorFlow Serving, or TensorFlow alone, can serve.

    Signatures: "serving_default" gives all tasks, and where there are several, each
    task has one of its own name, which computes nothing for the others.

    Args:
        model: as in `export_model`.
        path: the folder to write; must not exist. TensorFlow Serving wants a number as
            its name, the version.
        preprocessing: what makes the inputs of `model` from raw features, strings say:
            an adapted `keras.utils.FeatureSpace`, or a functional model with named
            inputs. Its tables go into the file.
        warmup: requests, dicts of one array a feature, which TensorFlow Serving runs
            before it takes others (`assets.extra/tf_serving_warmup_requests`).
        refuse_nan: bool, whether the graph refuses NaN and infinity with an error that
            names the feature. XLA drops such checks.

    Raises:
        ValueError: as in `export_model`, or if a request does not fit the signature.
        FileExistsError: if there is something at `path`.

    Example:

    >>> import tempfile
    >>> space = keras.utils.FeatureSpace({"city": "string_categorical"})
    >>> rows = {"city": np.array(["Rome", "Oslo"])}
    >>> import tensorflow as tf
    >>> space.adapt(tf.data.Dataset.from_tensor_slices(rows))
    >>> inputs = keras.Input(space.get_encoded_features().shape[1:], name="encoded")
    >>> model = keras.Model(inputs, {"click": keras_moe.layers.Tower(())(inputs)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keras_moe.export.export_saved_model(
    ...         model, f"{folder}/1", preprocessing=space, warmup=[{"city": [["Rome"]]}]
    ...     )
    ...     served = keras_moe.export.load(f"{folder}/1")
    >>> served({"city": [["Rome"], ["Oslo"]]})["click"].shape
    (2, 1)
    """
    _check_backend()
    _checks.flag("refuse_nan", refuse_nan)
    model = _behind(preprocessing, model)
    features, tasks = _checked_ports(model)
    _check_free(Path(path))
    specs = _tensor_specs(features)
    requests = [_requests.checked(specs, request) for request in warmup]

    def serve(features: dict[str, Any]) -> dict[str, Any]:
        if refuse_nan:
            features = _requests.without_nan(features)
        return model(_as_inputs(model, features), training=False)

    for request in requests:  # One that fails would keep a server from starting.
        _answer(serve, request)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve, [specs])
    for task in tasks if len(tasks) > 1 else ():
        archive.add_endpoint(
            task, lambda features, task=task: {task: serve(features)[task]}, [specs]
        )
    with _whole(Path(path)) as unfinished:
        archive.write_out(str(unfinished), verbose=False)
        if requests:
            _requests.write_warmup(unfinished, requests)


def load(path: str | Path, signature: str = "serving_default") -> Served:
    """Return a signature of a SavedModel as a function of a dict of features.

    Args:
        path: the folder of a SavedModel.
        signature: the name of the signature.

    Raises:
        ValueError: if the SavedModel has no such signature.
    """
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    _checks.one_of("signature", signature, loaded.signatures)
    return Served(loaded, signature)


class Served:
    """A signature of a SavedModel; its errors name the feature that is wrong.

    Args:
        loaded: what `tf.saved_model.load` returns.
        signature: the name of the signature.

    Call arguments:
        features: dict of one array a feature, with the batch as the first axis. An
            array must have the dtype of the feature; a list is converted.

    Returns:
        A dict of one NumPy array a task.

    Raises:
        ValueError: if a feature is missing, unknown, of another dtype or shape, or
            holds a NaN that the model refuses.
    """

    def __init__(self, loaded: Any, signature: str) -> None:
        self._loaded = loaded  # The variables live as long as this does.
        self._function = loaded.signatures[signature]
        self.features = self._function.structured_input_signature[1]
        self.tasks = tuple(sorted(self._function.structured_outputs))

    def __call__(self, features: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs of the signature for one batch."""
        request = _requests.checked(self.features, features)
        outputs = _answer(lambda inputs: self._function(**inputs), request)
        return {name: value.numpy() for name, value in outputs.items()}


def _answer(
    function: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return what `function` answers, or say which feature its graph refuses."""
    import tensorflow as tf

    try:
        return function({name: tf.constant(value) for name, value in request.items()})
    except tf.errors.InvalidArgumentError as error:
        message = _requests.refused(error)
        if message is None:
            raise
        raise ValueError(message) from error


# What a server may see.


def _check_backend() -> None:
    if _backend.name() != "tensorflow":
        raise ValueError(
            "models are exported on the TensorFlow backend. Save the model as a .keras "
            'file and load it there (KERAS_BACKEND="tensorflow"). Received: '
            f"the backend {_backend.name()!r}"
        )


def _behind(preprocessing: Any, model: keras.Model) -> keras.Model:
    """Return the model of raw features that `preprocessing` turns into inputs."""
    if preprocessing is None:
        return model
    if isinstance(preprocessing, keras.utils.FeatureSpace):
        raw = dict(preprocessing.get_inputs())  # Keras wants no other kind of dict.
        encoded = preprocessing.get_encoded_features()
    else:
        _check_functional("preprocessing", preprocessing)
        raw, encoded = preprocessing.input, preprocessing.output
    _check_functional("model", model)
    return keras.Model(raw, model(encoded))


def _check_functional(argument: str, model: Any) -> None:
    # A `Sequential` has `inputs` once it is built, and never an `input`.
    ports = ("inputs", "outputs", "input", "output")
    if not isinstance(model, keras.Model) or not all(
        getattr(model, port, None) is not None for port in ports
    ):
        raise ValueError(
            f"`{argument}` must be a functional model, made of its inputs and outputs, "
            "keras.Model(inputs, outputs), so that its signature is known. "
            f"Received: {argument}={model!r}"
        )


def _checked_ports(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs and outputs by name, if no server can mistake them."""
    _check_functional("model", model)
    inputs, outputs = model.input, model.output
    if not isinstance(outputs, dict):
        raise ValueError(
            "the outputs of `model` must be a dict by task name, or a server would "
            "tell tasks by their order: keras.Model(inputs, {'click': output}). "
            f"Received: outputs of type {type(outputs).__name__}"
        )
    if not isinstance(inputs, dict):
        inputs = inputs if isinstance(inputs, list | tuple) else [inputs]
        inputs = {getattr(tensor, "name", ""): tensor for tensor in inputs}
    for kind, ports in (("input", inputs), ("output", outputs)):
        for name, tensor in ports.items():
            _check_port(kind, name, tensor)
    if len(inputs) != len(model.inputs) or len(outputs) != len(model.outputs):
        raise ValueError(
            "the inputs and outputs of `model` must be one tensor a name. Received: "
            f"{len(model.inputs)} inputs {list(inputs)} and {len(model.outputs)} "
            f"outputs {list(outputs)}"
        )
    reserved = [name for name in _RESERVED if name in outputs]
    if reserved:
        raise ValueError(
            f"an output of `model` must not be called {reserved[0]!r}, which means "
            "something else in a SavedModel."
        )
    return inputs, outputs


def _check_port(kind: str, name: Any, tensor: Any) -> None:
    # TensorFlow would write "_" for "." and "-" in an input's name.
    more = "._-" if kind == "output" else "_"
    if not isinstance(name, str) or not re.fullmatch(
        rf"[A-Za-z][A-Za-z0-9{more}]*", name
    ):
        raise ValueError(
            f"the name of every {kind} of `model` must start with a letter and go on "
            f"in letters, digits and {list(more)}. Received: {name!r}"
        )
    if _UNNAMED.fullmatch(name):
        raise ValueError(
            f"every {kind} of `model` must have a name that tells servers what it is: "
            "keras.Input(shape, name='age'), keras.Model(inputs, {'click': output}). "
            f"Received: {name!r}"
        )
    if not isinstance(tensor, keras.KerasTensor) or tensor.dtype not in _DTYPES:
        raise ValueError(
            f"every {kind} of `model` must be a tensor of a dtype that requests have, "
            f"one of {list(_DTYPES)}. Received: {name!r} = {tensor!r}"
        )


def _tensor_specs(features: Mapping[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    return {
        name: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name)
        for name, tensor in features.items()
    }


def _as_inputs(model: keras.Model, features: Mapping[str, Any]) -> Any:
    """Arrange `features` as the model takes its inputs."""
    if isinstance(model.input, dict):
        return {name: features[name] for name in model.input}
    if isinstance(model.input, list | tuple):
        return [features[tensor.name] for tensor in model.input]
    return features[model.input.name]


# Files.


def _check_free(*paths: Path) -> None:
    for taken in paths:
        if taken.exists():
            raise FileExistsError(f"`path` must not exist. Received: {taken}")


@contextmanager
def _whole(path: Path, *companions: Path) -> Iterator[Path]:
    """Give a path to write to, which takes its place at the end, or never."""
    _check_free(path, *companions)
    near = next(parent for parent in path.absolute().parents if parent.exists())
    hidden = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=near))
    try:
        yield hidden / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        for final in (*companions, path):  # What refers to the others comes last.
            (hidden / final.name).rename(final)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def _dispatches(model: keras.Model, format: str) -> Iterator[None]:
    """Give the layers of `model` dispatches that the format can carry, for a while."""
    instead = _INSTEAD.get(format, {})
    layers = [
        (layer, layer.dispatch)
        for layer in model._flatten_layers(include_self=False)
        if getattr(layer, "dispatch", None) in instead
    ]
    try:
        for layer, dispatch in layers:
            layer.dispatch = instead[dispatch]
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
        if isinstance(router, _OTHERWISE.get(format, ())):
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

    specs = _tensor_specs(_checked_ports(model)[0])
    traced = tf.function(
        lambda features: model(_as_inputs(model, features), training=False)
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
