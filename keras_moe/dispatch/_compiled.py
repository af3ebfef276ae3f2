"""One program of JAX for a loop that is called more than once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from keras_moe import _backend


def compiled_once(
    function: Callable[..., Any], fixed: Any, prologue: Any
) -> Callable[..., Any]:
    """Return `function` with `fixed` as its first argument; on JAX, compiled once.

    In eager mode, JAX would compile the loops of `function` anew in each call, which
    takes seconds. In a program that is being traced, this changes nothing.

    Args:
        function: a function at module level, whose other arguments are tensors in any
            structure.
        fixed: all that tracing depends on: hashable, and equal for equal programs.
        prologue: a function in `fixed` that may be a user's. If it may read more than
            its arguments, it is traced anew in each call.
    """
    if _backend.name() == "jax" and _reads_arguments_only(prologue):
        function = _program(function)
    return functools.partial(function, fixed)


def _reads_arguments_only(function: Any) -> bool:
    """Whether `function` has no state: no closure, no object."""
    if dataclasses.is_dataclass(function):
        return all(map(_reads_arguments_only, vars(function).values()))
    return inspect.isfunction(function) and function.__closure__ is None


@functools.cache
def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    return jax.jit(function, static_argnums=0, inline=True)
