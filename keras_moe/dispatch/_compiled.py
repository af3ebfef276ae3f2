"""JAX programs that are kept between calls, for loops in eager mode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from keras_moe import _backend
from keras_moe.experts._protocol import GatedProduct


def compiled_once(function: Callable[..., Any], static: Any) -> Callable[..., Any]:
    """Return `function` with `static` as its first argument; on JAX, compiled once.

    In eager mode, JAX would compile the loops of `function` anew in each call, which
    takes seconds. Inside a program that is being traced, its operations are inlined,
    and the trace is reused. Programs are kept for each `static` and all shapes and
    dtypes, until `jax.clear_caches()`.

    Args:
        function: a function at module level, whose other arguments are tensors in any
            structure.
        static: a hashable record of all else that tracing reads. If its `activate` may
            read more than its arguments, nothing is kept.
    """
    if _backend.name() == "jax" and _is_known(static.activate):
        function = _program(function)
    return functools.partial(function, static)


def _is_known(activate: Any) -> bool:
    """Whether a prologue is of Keras, JAX or this library, and has no state.

    A user's function may read a variable that changes between two calls.
    """
    if isinstance(activate, GatedProduct):
        return _is_known(activate.activation)
    package = str(getattr(activate, "__module__", "")).split(".")[0]
    if inspect.isfunction(activate) and activate.__closure__ is not None:
        return False
    return package in ("keras", "keras_moe", "jax")


@functools.cache
def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    # Inlined, so that compilers see the programs that they see without it.
    return jax.jit(function, static_argnums=0, inline=True)
