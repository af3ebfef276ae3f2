"""SavedModel export: a signature per task, raw features, warm-up, input checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_moe import _checks
from keras_moe._files import atomic_write, check_free
from keras_moe.export import _ids, _requests
from keras_moe.export._inference import without_metrics
from keras_moe.export._loading import write_checksums
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
    check_ids: bool = True,
) -> None:
    """Write a SavedModel for TensorFlow Serving or TensorFlow.

    Signatures: "serving_default" returns all tasks. If there are several, there is also
    one signature per task, with the task's name, which computes only this task.

    Args:
        model: as in `export_model`.
        path: the output folder; must not exist. TensorFlow Serving needs a version
            number as its name.
        preprocessing: maps raw features, such as strings, to the inputs of `model`: an
            adapted `keras.utils.FeatureSpace`, or a functional model with named inputs.
            Its lookup tables are exported.
        warmup: requests, dicts of one array per feature, which TensorFlow Serving runs
            at startup (`assets.extra/tf_serving_warmup_requests`).
        refuse_nan: bool, whether the graph raises an error with the feature's name for
            NaN and infinity. XLA removes these checks.
        check_ids: bool, whether the graph raises an error with the feature's name for
            an id that is not a row of its `keras.layers.Embedding`, for all embeddings
            of the functional graph whose ids come from inputs by operations without
            weights. Negative ids, which Keras counts from the end, are refused too. XLA
            removes these checks.

    Raises:
        ValueError: as in `export_model`, or if a warm-up request is invalid.
        FileExistsError: if `path` exists.
        OSError: if the disk is full or read-only. Nothing is written then.

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
    _checks.flag("check_ids", check_ids)
    model = _with_preprocessing(preprocessing, model)
    features, tasks = checked_ports(model)
    check_free(Path(path))
    specs = tensor_specs(features)
    requests = [_requests.checked(specs, request) for request in warmup]
    ids = _ids.looked_up(features, model) if check_ids else {}

    def serve(features: dict[str, Any]) -> dict[str, Any]:
        if refuse_nan:
            features = _requests.check_finite(features)
        if ids:
            features = _ids.check_ids(features, ids)
        with without_metrics(model):
            return model(as_inputs(model, features), training=False)

    for request in requests:  # A failing request would prevent a server's startup.
        _requests.call(serve, request)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve, [specs])
    for task in tasks if len(tasks) > 1 else ():
        archive.add_endpoint(
            task, lambda features, task=task: {task: serve(features)[task]}, [specs]
        )
    with atomic_write(Path(path)) as unfinished:
        archive.write_out(str(unfinished), verbose=False)
        if requests:
            _requests.write_warmup(unfinished, requests)
        write_checksums(unfinished)


def _with_preprocessing(preprocessing: Any, model: keras.Model) -> keras.Model:
    """Return `model` applied to the outputs of `preprocessing`."""
    if preprocessing is None:
        return model
    if isinstance(preprocessing, keras.utils.FeatureSpace):
        raw = dict(preprocessing.get_inputs())  # Keras accepts only a plain dict.
        encoded = preprocessing.get_encoded_features()
    else:
        check_functional("preprocessing", preprocessing)
        raw, encoded = preprocessing.input, preprocessing.output
    check_functional("model", model)
    return keras.Model(raw, model(encoded))
