"""JAX programs that are kept between calls, for loops in eager mode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from keras_moe import _backend
from keras_moe.experts._protocol import GatedProduct

_PACKAGES = ("jax", "keras", "keras_moe")


def with_gradient(
    forward: Callable[..., Any],
    gradient: Callable[..., Any],
    static: Any,
    inputs: Sequence[Any],
    constants: Any,
) -> Any:
    """`_backend.with_gradient` of two functions that JAX compiles once.

    In eager mode, JAX would compile their loops anew in each call, which takes seconds.
    Inside a program that is being traced, their operations are inlined, and the trace
    is reused. Programs are kept for each `static` and all shapes and dtypes, until
    `jax.clear_caches()`.

    Args:
        forward: a function at module level, of `static`, the inputs and the constants.
        gradient: a function at module level, of `static`, all inputs, the constants and
            the upstream gradient.
        static: a hashable record of all that tracing reads beside tensors. If its
            `activate` may read more than its arguments, nothing is kept.
        inputs: float tensors.
        constants: tensors without a gradient, in any structure.
    """
    if _backend.name() == "jax" and _is_stateless(static.activate):
        forward, gradient = _program(forward), _program(gradient)
    return _backend.with_gradient(
        functools.partial(forward, static),
        functools.partial(gradient, static),
        inputs,
        constants,
    )


def _is_stateless(activate: Any) -> bool:
    """Whether a prologue is a function of Keras, JAX or this library.

    A user's function may read a variable that changes between two calls.
    """
    import jax

    if isinstance(activate, GatedProduct):
        return _is_stateless(activate.activation)
    if inspect.isfunction(activate):
        package = activate.__module__.split(".")[0]
        return activate.__closure__ is None and package in _PACKAGES
    # Some functions of `jax.nn` are objects.
    return activate is getattr(jax.nn, getattr(activate, "__name__", ""), None)


@functools.cache
def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    # Inlined, so that compilers see the programs that they see without it.
    return jax.jit(function, static_argnums=0, inline=True)
