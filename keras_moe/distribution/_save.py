"""One file of a model whose variables are split over the devices of many processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_moe import _backend, _files, _mesh

_SUFFIXES = (".keras", ".weights.h5")


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a model that is split over several processes of JAX as one file.

    `model.save` needs all of a variable in its process, and fails where experts, tables
    or their optimizer slots are split over processes. This function collects their
    parts in the memory of process 0, which writes the file; one process can load it,
    and so can any distribution. The file appears when it is complete, in place of an
    older one.

    Every process must call it, since they send their parts, and it returns in all of
    them when the file is there. A device holds one more part of one variable at a time.
    With a single process, and on other backends, it is `model.save` with the same
    guarantee for the file::

        save = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: keras_moe.distribution.save(model, path)
        )
        model.fit(dataset, epochs=10, callbacks=[save])

    Args:
        model: a built Keras model.
        path: a path that ends with ".keras" (all of the model) or ".weights.h5" (its
            weights), which process 0 can write.

    Raises:
        ValueError: if `path` has another suffix, the model is not built, or it lost its
            weights in a step that failed.
        OSError: in every process, if process 0 cannot write the file.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keras_moe.distribution.save(model, f"{folder}/model.keras")
    ...     keras.models.load_model(f"{folder}/model.keras").count_params()
    5
    """
    if not str(path).endswith(_SUFFIXES):
        raise ValueError(f"`path` must end with one of {_SUFFIXES}. Received: {path!r}")
    if not getattr(model, "built", False):
        raise ValueError(
            "`model` must be built: call it once, or `model.build(input_shape)`. "
            f"Received: model={model!r}"
        )
    if any(v._value is None for v in model.variables):
        raise ValueError(
            "`model` must have its weights. JAX loses them when a step fails, such as "
            "at a batch that the axis of the batch does not divide: load them from the "
            f"last file. Received: model={model!r}, without values"
        )
    write = model.save if str(path).endswith(".keras") else model.save_weights
    if _backend.name() != "jax" or keras.distribution.distribution() is None:
        _write(write, Path(path))
        return
    import jax

    writes = jax.process_index() == 0
    split = {id(v): v for v in _variables(model) if not v.value.is_fully_addressable}
    values = [_mesh.collected(v.value, keeps=writes) for v in split.values()]
    failure = None
    if writes:
        try:
            with _on_host(split.values(), values):
                _write(write, Path(path))
        except Exception as error:
            failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
        if failed and failure is None:
            raise OSError(f"Process 0 could not write `path`: see there. {path!r}")
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _on_host(variables: Iterable[Any], values: Iterable[Any]) -> Iterator[None]:
    """Give variables values on the host, in a process alone."""
    # A `StatelessScope` would do without `_value`, but Keras makes variables, too.
    active = keras.distribution.distribution()
    kept = [(variable, variable._value) for variable in variables]
    keras.distribution.set_distribution(None)
    try:
        for (variable, _), value in zip(kept, values, strict=True):
            variable._value = value
        yield
    finally:
        for variable, value in kept:
            variable._value = value
        keras.distribution.set_distribution(active)


def _write(write: Callable[[Any], None], path: Path) -> None:
    with _files.atomic_write(path, overwrite=True) as unfinished:
        write(unfinished)


def _variables(model: Any) -> Iterator[Any]:
    """Yield the variables of a model, of its metrics and of its optimizer."""
    optimizer = getattr(model, "optimizer", None)
    yield from model.variables
    yield from getattr(model, "metrics_variables", ())
    yield from getattr(optimizer, "variables", ())
