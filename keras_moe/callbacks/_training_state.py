"""What `fit` needs to go on: variables, random states, states of callbacks."""

from __future__ import annotations

import inspect
import random
import re
from collections import deque
from collections.abc import Mapping, Sequence, Set
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state  # Not in the public API.
from keras.src.random import seed_generator

from keras_moe import _mesh
from keras_moe.callbacks._state_file import is_plain

_OF_KERAS = ("model", "_model", "params", "validation_data")
# Also within a name: an optimizer has `dense_1_kernel_momentum`.
_COUNTERS = re.compile(r"_\d+(?=[_/]|$)")


def read_variables(model: keras.Model) -> dict[str, list[Any]]:
    """Return all variables: the values of "variables" and "metrics", their "paths"."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
    variables, metrics = _variables(model)
    return {
        "variables": [_to_numpy(variable) for variable in variables],
        "metrics": [_to_numpy(variable) for variable in metrics],
        "paths": [_path(variable) for variable in [*variables, *metrics]],
    }


def assign_variables(
    model: keras.Model, state: dict[str, list[Any]], with_metrics: bool
) -> None:
    """Assign the values of `read_variables`.

    Raises:
        ValueError: if the model has other variables; then none is changed.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
    variables, metrics = _variables(model)
    count = len(state["variables"])
    paths = state["paths"]
    pairs = _paired(variables, state["variables"], paths[:count])
    if with_metrics:
        pairs += _paired(metrics, state["metrics"], paths[count:])
    for variable, value in pairs:
        variable.assign(value)
    _renew_jax_state(model)


def _renew_jax_state(model: keras.Model) -> None:
    """Make the state that Keras keeps on JAX that of the variables.

    Keras renews it with the next batch that it trains. If there is none, as at the end
    of data of unknown length, it would give the variables what was before.
    """
    kept = getattr(model, "_jax_state", None)
    if kept:
        known = {
            "trainable_variables": model.trainable_variables,
            "non_trainable_variables": model.non_trainable_variables,
            "optimizer_variables": model.optimizer.variables,
            "metrics_variables": model.metrics_variables,
        }
        model._jax_state = {name: [v.value for v in known[name]] for name in kept}


def _variables(model: keras.Model) -> tuple[list[Any], list[Any]]:
    """Return weights, seed generators and optimizer; and the metrics."""
    optimizer = getattr(model, "optimizer", None)
    metrics = {id(v): v for v in model.metrics_variables}
    found = [*model.variables, *([] if optimizer is None else optimizer.variables)]
    others = {id(v): v for v in found if id(v) not in metrics}
    return list(others.values()), list(metrics.values())


def _paired(
    variables: Sequence[Any], values: Sequence[np.ndarray], paths: Sequence[str]
) -> list[tuple[Any, np.ndarray]]:
    for i in range(max(len(variables), len(values))):
        here = there = "no such variable"
        if i < len(variables):
            here = _described(variables[i], _path(variables[i]))
        if i < len(values):
            there = _described(values[i], paths[i])
        if here != there:
            raise ValueError(
                "the model of `fit` must be that of the backup. "
                f"Received: variable {i}: {here}; in the backup: {there}"
            )
    return list(zip(variables, values, strict=True))


def random_states() -> dict[str, Any]:
    """Return the states of the global generators: Python, NumPy, Keras and torch."""
    of_keras = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        # Made when it is first needed, with a draw from Python's generator.
        "keras": None if of_keras is None else _to_numpy(of_keras.state),
        "torch": _torch_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set what `random_states` returned."""
    if states["keras"] is not None:
        seed_generator.global_seed_generator().state.assign(states["keras"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if states["torch"] is not None:
        _set_torch_states(states["torch"])


def _torch_states() -> list[np.ndarray] | None:
    # Keras draws from them: dropout without a seed, and the order of arrays.
    if keras.backend.backend() != "torch":
        return None
    import torch

    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [state.numpy() for state in states]


def _set_torch_states(states: list[np.ndarray]) -> None:
    import torch

    of_cpu, *of_gpus = (torch.from_numpy(state) for state in states)
    torch.set_rng_state(of_cpu)
    torch.cuda.set_rng_state_all(of_gpus)


def callback_state(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Return the attributes that are plain values or arrays, but the settings.

    Settings are the arguments of the constructor. Keras changes some of them in the
    first epoch (`min_delta`), and does so again after a restore.
    """
    settings = _settings(callback)
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in settings and is_plain(value)
    }


def not_saved(callback: keras.callbacks.Callback) -> list[str]:
    """Return the attributes that look like a state and cannot be saved."""
    kinds = (Mapping, Set, list, deque)
    settings = _settings(callback)
    return [
        name
        for name, value in vars(callback).items()
        if name not in settings and isinstance(value, kinds) and not is_plain(value)
    ]


def set_callback_state(
    callback: keras.callbacks.Callback, state: dict[str, Any]
) -> None:
    """Set what `callback_state` returned."""
    for name, value in state.items():
        setattr(callback, name, value)


def _settings(callback: keras.callbacks.Callback) -> set[str]:
    names = set(_OF_KERAS)
    for kind in type(callback).__mro__:
        if "__init__" in vars(kind):
            names.update(inspect.signature(vars(kind)["__init__"]).parameters)
    return names


def _path(variable: Any) -> str:
    # Without the numbers by which Keras counts names up in a process, as `dense_1`.
    return _COUNTERS.sub("", variable.path)


def _described(variable: Any, path: str) -> str:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return f"{path} of shape {tuple(variable.shape)} and dtype {dtype}"


def _to_numpy(variable: Any) -> np.ndarray:
    value = variable.value
    if not getattr(value, "is_fully_addressable", True):
        whole = _mesh.collected(value)
        assert whole is not None
        return whole
    # A copy: JAX and torch may share their memory.
    return np.array(keras.ops.convert_to_numpy(value))
