"""Grouped matmuls of sorted rows by kernels of a TPU (`_tpu_kernels`).

XLA has a grouped kernel for `ragged_dot` and its gradient by the rows, but expands the
gradient by the kernels over all experts, and reads and writes the rows for each bias
and activation.

Axis letters: e experts, m rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend
from keras_moe.dispatch._rows import identity
from keras_moe.experts._protocol import Prologue
from keras_moe.routing import SortedChoices

_TYPES = {"float32", "bfloat16"}
_WIDEST = 16384
# What a kernel may compute, besides the calls that contain it.
_ELEMENTWISE = frozenset(
    """abs add add_any and broadcast_in_dim convert_element_type div eq erf exp exp2 ge
    gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow
    rsqrt select_n sign sqrt square stop_gradient sub tanh""".split()  # noqa: SIM905
)
_CALLS = frozenset(["jit", "pjit", "custom_jvp_call", "custom_vjp_call"])


def supports(rows: Sequence[Any], kernel: Any, dtype: Any) -> bool:
    """Whether there are kernels for (m, in), (e, in, out) and a compute dtype.

    m must be static; the weights may have more bits than the rows.
    """
    standard = keras.backend.standardize_dtype
    m, widest = rows[0].shape[0], max(kernel.shape[1:])
    return (
        isinstance(m, int)
        and m > 0
        and widest <= _WIDEST
        and {standard(dtype), standard(kernel.dtype)} <= _TYPES
        and all(standard(row.dtype) == standard(dtype) for row in rows)
    )


def affine(
    rows: Sequence[Any],
    weights: Sequence[Any],
    prologue: Prologue,
    runs: SortedChoices,
) -> Any:
    """(m, in), (e, in, out), (e, out) if any -> (m, out): prologue(x_r) W_e + b_e."""
    from keras_moe.dispatch import _tpu_kernels

    if not fits_kernels(prologue, rows):
        rows, prologue = (prologue(*rows),), identity
    kernel, *biases = weights
    shape = kernel.shape[0], kernel.shape[2]
    bias = biases[0] if biases else ops.zeros(shape, kernel.dtype)
    with _bits_32():
        return _tpu_kernels.products(rows, kernel, bias, prologue, runs)


def affine_gradient(
    rows: Sequence[Any],
    weights: Sequence[Any],
    prologue: Prologue,
    runs: SortedChoices,
    upstream: Any,
) -> tuple[Any, ...]:
    """Return the gradients of `affine` by its rows, kernel and bias (if any)."""
    from keras_moe.dispatch import _tpu_kernels

    if not fits_kernels(prologue, rows):
        hidden, pull = _backend.pullback(prologue, rows)
        by_hidden, *by_weights = affine_gradient(
            (hidden,), weights, identity, runs, upstream
        )
        return (*pull(by_hidden), *by_weights)
    with _bits_32():
        by_weights = _tpu_kernels.weight_gradients(
            rows, upstream, prologue, runs, weights[0].dtype
        )[: len(weights)]
        if prologue is identity:
            by_rows = _tpu_kernels.row_gradients(
                upstream, weights[0], (), lambda product: [product], runs
            )
            return (*by_rows, *by_weights)
        # The gradients by the rows take their memory, hence come last.
        rows, by_weights = _one_after_the_other(tuple(rows), by_weights)
        by_rows = _tpu_kernels.row_gradients(
            upstream, weights[0], rows, _gradient_of(prologue), runs
        )
        return (*by_rows, *by_weights)


def fits_kernels(prologue: Callable[..., Any], rows: Sequence[Any]) -> bool:
    """Whether a kernel can compute `prologue` of `rows`, and its gradient.

    Not if it uses other tensors than its arguments, or functions that kernels lack.
    """
    import jax

    tiles = [jax.ShapeDtypeStruct((8, row.shape[1]), "float32") for row in rows]
    pull = _gradient_of(prologue)
    traced = [
        jax.make_jaxpr(prologue)(*tiles),
        jax.make_jaxpr(pull)(*tiles[:1], *tiles),
    ]
    return all(not t.consts and _is_elementwise(t.jaxpr) for t in traced)


def _gradient_of(prologue: Callable[..., Any]) -> Callable[..., Any]:
    def pull(upstream: Any, *rows: Any) -> Any:
        return _backend.pullback(prologue, rows)[1](upstream)

    return pull


def _is_elementwise(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _CALLS:
            inner = [equation.params.get(key) for key in ("jaxpr", "call_jaxpr")]
            closed = next(jaxpr for jaxpr in inner if jaxpr is not None)
            if closed.consts or not _is_elementwise(closed.jaxpr):
                return False
        elif name not in _ELEMENTWISE:
            return False
    return True


def _one_after_the_other(later: Any, sooner: Any) -> Any:
    """Return both, such that what is computed of `later` waits for `sooner`."""
    import jax

    return jax.lax.optimization_barrier((later, sooner))


def _bits_32() -> Any:
    """The index maps of Pallas must be 32 bits wide where JAX may use 64."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    from jax.experimental import disable_x64

    return disable_x64()
