"""SavedModels: a signature for every task, raw features, warm-up, named errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_moe import _checks
from keras_moe.export import _requests
from keras_moe.export._files import check_free, whole
from keras_moe.export._ports import (
    as_inputs,
    check_backend,
    check_functional,
    checked_ports,
    tensor_specs,
)


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
    check_backend()
    _checks.flag("refuse_nan", refuse_nan)
    model = _behind(preprocessing, model)
    features, tasks = checked_ports(model)
    check_free(Path(path))
    specs = tensor_specs(features)
    requests = [_requests.checked(specs, request) for request in warmup]

    def serve(features: dict[str, Any]) -> dict[str, Any]:
        if refuse_nan:
            features = _requests.without_nan(features)
        return model(as_inputs(model, features), training=False)

    for request in requests:  # One that fails would keep a server from starting.
        _requests.answer(serve, request)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve, [specs])
    for task in tasks if len(tasks) > 1 else ():
        archive.add_endpoint(
            task, lambda features, task=task: {task: serve(features)[task]}, [specs]
        )
    with whole(Path(path)) as unfinished:
        archive.write_out(str(unfinished), verbose=False)
        if requests:
            _requests.write_warmup(unfinished, requests)


def _behind(preprocessing: Any, model: keras.Model) -> keras.Model:
    """Return the model of raw features that `preprocessing` turns into inputs."""
    if preprocessing is None:
        return model
    if isinstance(preprocessing, keras.utils.FeatureSpace):
        raw = dict(preprocessing.get_inputs())  # Keras wants no other kind of dict.
        encoded = preprocessing.get_encoded_features()
    else:
        check_functional("preprocessing", preprocessing)
        raw, encoded = preprocessing.input, preprocessing.output
    check_functional("model", model)
    return keras.Model(raw, model(encoded))
