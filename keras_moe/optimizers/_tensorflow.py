"""Kernels of TensorFlow that update a variable in one pass, or only rows of it.

A row is one element of the first axis: (rows, ...). XLA compiles the same functions,
for which the number of rows of a gradient must be static.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import _backend

# In half precision, the kernels' 1 - beta_2 is 0 or far from that of Keras.
_KERNEL_DTYPES = ("float32", "float64")


def has_kernels() -> bool:
    """Whether an update runs as a kernel on the variable: TensorFlow without XLA."""
    return _backend.name() == "tensorflow" and not _backend.under_xla()


def has_kernel_for(variable: Any) -> bool:
    """Whether the dense update of this variable is one kernel."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return has_kernels() and dtype in _KERNEL_DTYPES


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient is a `tf.IndexedSlices`, as that of an embedding is."""
    if _backend.name() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(gradient, tf.IndexedSlices)


def expand(gradient: Any) -> Any:
    """Return a dense gradient: sparse ones with repeated rows summed."""
    if not is_sparse(gradient):
        return gradient
    import tensorflow as tf

    shape = gradient.dense_shape
    rows = tf.shape(gradient.values)[0] if shape is None else shape[0]
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)


def apply_adam(
    variable: Any,
    slots: Sequence[Any],
    gradient: Any,
    learning_rate: Any,
    beta_1: float,
    beta_2: float,
    step: Any,
    epsilon: float,
) -> None:
    """Update a variable and its slots (m, v), or (m, v, v_hat) for AMSGrad."""
    import tensorflow as tf

    dtype = variable.dtype
    excess_1 = _excess(beta_1, step, dtype.as_numpy_dtype)
    excess_2 = _excess(beta_2, step, dtype.as_numpy_dtype)
    rate = tf.cast(learning_rate, dtype)
    rate *= tf.cast(tf.sqrt(excess_2) / excess_1, dtype)
    betas = [tf.constant(beta, dtype) for beta in (beta_1, beta_2)]
    # Keras, too, rounds the base to float32 first.
    bases = [tf.cast(beta, dtype) for beta in (beta_1, beta_2)]
    powers = [tf.pow(base, tf.cast(step, dtype)) for base in bases]
    names = ("m", "v", "vhat")[: len(slots)]
    slot_handles = {name: handle(slot) for name, slot in zip(names, slots, strict=True)}
    kernels = {
        2: tf.raw_ops.ResourceApplyAdam,
        3: tf.raw_ops.ResourceApplyAdamWithAmsgrad,
    }
    kernels[len(slots)](
        var=handle(variable),
        **slot_handles,
        beta1_power=powers[0],
        beta2_power=powers[1],
        lr=rate,
        beta1=betas[0],
        beta2=betas[1],
        epsilon=tf.constant(epsilon, dtype),
        grad=tf.cast(gradient, dtype),
    )


def _excess(beta: float, step: Any, dtype: Any) -> Any:
    """Return how much larger a slot of the kernel is than one of Keras.

    The kernel computes 1 - beta in float32, which is off by 1.3e-5 for 0.999, where
    Keras rounds 0.001. This is the ratio of the slots where gradients do not change.
    """
    import tensorflow as tf

    of_kernel = float(dtype(1) - dtype(beta))
    of_keras = float(dtype(1 - beta))
    step = tf.cast(step, tf.float64)
    return (1 - tf.pow(tf.constant(1 - of_kernel, tf.float64), step)) / (
        1 - tf.pow(tf.constant(1 - of_keras, tf.float64), step)
    )


def apply_adagrad(
    variable: Any, accumulator: Any, gradient: Any, learning_rate: Any
) -> None:
    """Add gradient^2 to the accumulator; subtract rate * gradient / sqrt of it."""
    import tensorflow as tf

    tf.raw_ops.ResourceApplyAdagrad(
        var=handle(variable),
        accum=handle(accumulator),
        lr=tf.cast(learning_rate, variable.dtype),
        grad=tf.cast(gradient, variable.dtype),
    )


def handle(variable: Any) -> Any:
    """Return the resource of a variable, under a strategy that of this replica."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return value.handle


def slot_rows(slot: Any, ids: Any) -> Any:
    """Return rows of a slot without a read of the others."""
    import tensorflow as tf

    return tf.raw_ops.ResourceGather(
        resource=handle(slot), indices=ids, dtype=slot.dtype
    )


def table_rows(table: Any, ids: Any) -> Any:
    """Return rows of a table without a copy of the others.

    Keras' Embedding reads all of the table before it gathers rows. Such a read shares
    the memory of the table, but beside a ResourceGather it is a copy: 10^7 rows a step.
    """
    import tensorflow as tf

    _reads_share_memory(table)
    value = tf.raw_ops.ReadVariableOp(resource=handle(table), dtype=table.dtype)
    return tf.gather(value, ids)


def _reads_share_memory(variable: Any) -> None:
    """End the mode, begun by ResourceGather and scatters, in which reads are copies."""
    import tensorflow as tf

    if not _backend.under_xla():
        tf.raw_ops.DisableCopyOnRead(resource=handle(variable))


def change_slot(slot: Any, ids: Any, rows: Any, changes: Any) -> None:
    """Add `changes` to rows of a slot in place; the others are not touched.

    Args:
        slot: the variable.
        ids: ids of the rows, each once, but for those of `sum_repeated` under XLA.
        rows: the rows, before.
        changes: what is added to them.
    """
    import tensorflow as tf

    resource = handle(slot)
    if _backend.under_xla():
        tf.raw_ops.ResourceScatterAdd(resource=resource, indices=ids, updates=changes)
        return
    # ResourceScatterAdd takes two to seven times as long to write as many rows.
    tf.raw_ops.ResourceScatterUpdate(
        resource=resource, indices=ids, updates=rows + changes
    )


def change_table(table: Any, ids: Any, rows: Any, changes: Any) -> None:
    """Add `changes` to rows of a table, as `change_slot`; reads still do not copy."""
    change_slot(table, ids, rows, changes)
    _reads_share_memory(table)


def sum_repeated(gradient: Any) -> tuple[Any, Any]:
    """Return the ids of a sparse gradient, `(n,)`, and the sum of each, `(n, ...)`.

    Each id once; under XLA, n is that of the gradient, and rows of zeros with any id
    are at the end.
    """
    import tensorflow as tf

    if not _backend.under_xla():
        ids, positions = tf.unique(gradient.indices)
        count = tf.size(ids)
        return ids, tf.math.unsorted_segment_sum(gradient.values, positions, count)
    order = tf.argsort(gradient.indices, stable=True)
    ids = tf.gather(gradient.indices, order)
    starts = tf.concat(
        [tf.zeros_like(ids[:1]), tf.cast(ids[1:] != ids[:-1], ids.dtype)], 0
    )
    segments, count = tf.cumsum(starts), tf.shape(ids)[0]
    sums = tf.math.unsorted_segment_sum(
        tf.gather(gradient.values, order), segments, count
    )
    # The maximum of no id is the lowest integer.
    return tf.maximum(tf.math.unsorted_segment_max(ids, segments, count), 0), sums


def row_gradients(gradient: Any, variable: Any) -> tuple[Any, Any]:
    """Return the ids of a sparse gradient and the sums, as rows of `variable`."""
    import tensorflow as tf

    ids, sums = sum_repeated(gradient)
    # A gradient that several replicas have sent has rows of unknown shape.
    sums = tf.ensure_shape(sums, (None, *variable.shape[1:]))
    return ids, tf.cast(sums, variable.dtype)


def with_repeated_summed(gradient: Any) -> Any:
    """Return a sparse gradient whose norm is that of the dense one."""
    import tensorflow as tf

    ids, sums = sum_repeated(gradient)
    return tf.IndexedSlices(sums, ids, gradient.dense_shape)


def with_values(gradient: Any, values: Any) -> Any:
    """Return a sparse gradient with other values for its rows."""
    import tensorflow as tf

    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def divisible(gradient: Any) -> Any:
    """Return a sparse gradient that `/` divides, as Keras does by a loss scale."""
    import tensorflow as tf

    class DivisibleSlices(tf.IndexedSlices):
        def __truediv__(self, scale: Any) -> Any:
            return with_values(self, self.values / scale)

    return DivisibleSlices(gradient.values, gradient.indices, gradient.dense_shape)
