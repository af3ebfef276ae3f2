"""Backend-specific functions that keras.ops does not provide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops


def name() -> str:
    """Return "tensorflow", "jax" or "torch"."""
    return keras.backend.backend()


def under_xla() -> bool:
    """Whether XLA will compile the graph that is being traced."""
    if name() == "jax":
        return True
    if name() != "tensorflow":
        return False
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    # Nested functions and loops inherit jit_compile=True from their outer graphs.
    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


def on_accelerator() -> bool:
    """Whether the host's default device is a GPU or TPU.

    A program that is compiled for another device may differ: see `on_tpu_or`.
    """
    if name() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    if name() == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices()
        return any(device.device_type in ("GPU", "TPU") for device in devices)
    import torch

    return torch.cuda.is_available()


def default_device_is_gpu() -> bool:
    """Whether JAX, the backend in use, computes on a GPU unless told otherwise."""
    import jax

    return jax.default_backend() == "gpu"


def fuses_dense() -> bool:
    """Whether a matmul, its bias and its activation run as one kernel.

    TensorFlow does so on a CPU without XLA. One such matmul per expert is then faster
    than one batched matmul for all of them.
    """
    return name() == "tensorflow" and not under_xla() and not on_accelerator()


def on_tpu_or(
    on_tpu: Callable[..., Any], elsewhere: Callable[..., Any], *tensors: Any
) -> Any:
    """Return `on_tpu(*tensors)` in programs for a TPU, else `elsewhere(*tensors)`.

    On JAX both are traced; the platform that a program is compiled for decides, which
    need not be that of the host. The other backends have no TPU here.
    """
    if name() != "jax":
        return elsewhere(*tensors)
    import jax

    return jax.lax.platform_dependent(*tensors, tpu=on_tpu, default=elsewhere)


def is_traced(tensor: Any) -> bool:
    """Whether `tensor` is one of a program that JAX or `tf.function` is tracing."""
    if name() == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.is_symbolic_tensor(tensor)
    return False


def with_gradient(
    function: Callable[..., Any],
    gradient: Callable[..., Any],
    inputs: Sequence[Any],
    constants: Any,
) -> Any:
    """Return `function(*inputs, constants)` with the gradient `gradient(inputs, up)`.

    Args:
        function: function of the inputs and the constants.
        gradient: function of `inputs`, `constants` and the upstream gradient. Returns
            a tuple of one gradient for each of `inputs`, equal to that of automatic
            differentiation, which torch uses instead.
        inputs: float tensors.
        constants: tensors without a gradient, in any structure. On JAX neither function
            may close over other tensors: `jax.checkpoint` would fail.
    """
    if name() == "torch":
        return function(*inputs, constants)
    if name() == "jax":
        return _jax_with_gradient(function, gradient)(tuple(inputs), constants)

    @ops.custom_gradient
    def call(*inputs: Any) -> Any:
        def pull(upstream: Any) -> Any:
            return gradient(inputs, constants, upstream)

        return function(*inputs, constants), pull

    return call(*inputs)


def _jax_with_gradient(
    function: Callable[..., Any], gradient: Callable[..., Any]
) -> Callable[..., Any]:
    import jax

    @jax.custom_vjp
    def call(inputs: Any, constants: Any) -> Any:
        return function(*inputs, constants)

    def forward(inputs: Any, constants: Any) -> Any:
        return function(*inputs, constants), (inputs, constants)

    def backward(kept: Any, upstream: Any) -> Any:
        return tuple(gradient(*kept, upstream)), None

    call.defvjp(forward, backward)
    return call


def restored_axes(leading: Sequence[Any]) -> tuple[Any, ...]:
    """Return the leading axes for a reshape, which can infer one: the batch.

    A known batch stays as it is, because -1 cannot be inferred for an empty batch.
    """
    return (leading[0] if isinstance(leading[0], int) else -1, *leading[1:])


def as_tensor(variable: Any) -> Any:
    """Return the value of a variable, in the dtype that autocast gives it."""
    value = ops.convert_to_tensor(variable)
    if name() != "tensorflow":
        return value
    import tensorflow as tf

    # In eager mode Keras returns the tf.Variable; a custom gradient needs a tensor.
    return tf.convert_to_tensor(value)


def without_autocast(variable: Any) -> Any:
    """Return the value of a variable, in its own dtype under a mixed policy, too."""
    from keras.src.backend.common.variables import AutocastScope  # Not exported.

    with AutocastScope(None):
        return as_tensor(variable)


def pullback(
    function: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[Any, Callable[[Any], Sequence[Any]]]:
    """Return `function(*inputs)` and its vector-Jacobian product (`jax.vjp`)."""
    if name() == "jax":
        import jax

        return jax.vjp(function, *inputs)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs)

    def pull(upstream: Any) -> Sequence[Any]:
        return tape.gradient(
            outputs,
            list(inputs),
            output_gradients=upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    return outputs, pull


def top_k(scores: Any, k: int) -> tuple[Any, Any]:
    """Return the k largest of the last axis and their indices, best first.

    Ties go to the lower index, which `torch.topk` does not guarantee.
    """
    if name() != "torch":
        return ops.top_k(scores, k)
    import torch

    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def take_rows(rows: Any, indices: Any) -> Any:
    """Return `rows[indices]` for indices in range.

    By default JAX compares each index with the number of rows, and selects: two more
    passes over the rows.
    """
    if name() != "jax":
        return ops.take(rows, indices, axis=0)

    def take(rows: Any, indices: Any) -> Any:
        return rows.at[indices].get(mode="promise_in_bounds")

    def take_tiles(rows: Any, indices: Any) -> Any:
        # A tile of a TPU has parts of 8 rows; in this shape, parts of one.
        tiles = take(ops.reshape(rows, (rows.shape[0], -1, 128)), indices)
        return ops.reshape(tiles, (*tiles.shape[:-2], rows.shape[-1]))

    if len(rows.shape) != 2 or rows.shape[1] % 128 or rows.shape[1] == 128:
        return take(rows, indices)
    return on_tpu_or(take_tiles, take, rows, indices)


def split_rows(rows: Any, sizes: Any, count: int) -> Sequence[Any]:
    """Split the first axis into `count` parts of data-dependent `sizes`."""
    if name() == "torch":
        import torch

        return torch.split(rows, [int(size) for size in sizes])
    import tensorflow as tf

    return tf.split(rows, sizes, num=count)


def assert_same_rows(first: Any, second: Any, message: str) -> Any:
    """Return `first`, with a runtime check that the first axes are equal.

    Only TensorFlow without XLA has data-dependent shapes. The result must be used: in a
    graph, an assertion without a control dependency may run after the operation that it
    guards.
    """
    if name() != "tensorflow" or under_xla():
        return first
    import tensorflow as tf

    sizes = tf.shape(first)[0], tf.shape(second)[0]
    same = tf.debugging.assert_equal(*sizes, message=message)
    # In eager mode the assertion has already run and returns None.
    with tf.control_dependencies([] if same is None else [same]):
        return tf.identity(first)


def keras_mask(tensor: Any) -> Any:
    """Return the mask that Keras has attached to a tensor, or None.

    On JAX, whose tensors accept no attributes, Keras stores masks elsewhere.
    """
    from keras.src.backend import get_keras_mask  # Keras does not export it.

    return get_keras_mask(tensor)


def attach_keras_mask(tensor: Any, mask: Any) -> Any:
    """Attach a mask to a tensor, as Keras does after a layer; return the tensor."""
    from keras.src.backend import set_keras_mask

    if mask is not None:
        set_keras_mask(tensor, mask)
    return tensor


def num_replicas() -> int:
    """Return the number of `tf.distribute` replicas in sync."""
    if name() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(value: Any) -> Any:
    """Return the sum of `value` over all `tf.distribute` replicas."""
    if num_replicas() == 1:
        return value
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def gather_over_replicas(value: Any) -> Any:
    """Return the rows (first axis) of all `tf.distribute` replicas, in their order."""
    if num_replicas() == 1:
        return value
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return value if context is None else context.all_gather(value, axis=0)


class StackedGradients:
    """The gradients of a variable by t tasks, stacked on a new first axis.

    Args:
        values: `(t, ...)`.
        indices: None, or the rows of the variable that `values`, `(t, rows, ...)`,
            are for.
        shape: the shape of the variable, for sparse gradients.
    """

    def __init__(self, values: Any, indices: Any = None, shape: Any = None) -> None:
        self.values = values
        self.indices = indices
        self.shape = shape

    def weighted_sum(self, weights: Any) -> Any:
        """(t,) -> sum_i weights_i values_i, sparse if the gradients are."""
        # As t is small, a sum is faster than a product with a matrix of one row.
        parts = zip(ops.unstack(weights), ops.unstack(self.values), strict=True)
        total: Any = sum(weight * value for weight, value in parts)
        if self.indices is None:
            return total
        import tensorflow as tf

        return tf.IndexedSlices(total, self.indices, self.shape)


def stack_gradients(gradients: Sequence[Any]) -> StackedGradients:
    """Stack the gradients of one variable by task; zeros for None.

    Sparse gradients (`tf.IndexedSlices`, of an embedding) stay sparse without XLA,
    which has no operation for a data-dependent number of rows.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        replicas = num_replicas()
        sparse = [isinstance(g, tf.IndexedSlices) for g in gradients if g is not None]
        if all(sparse) and not under_xla() and replicas == 1:
            return _stack_sparse(gradients)
        # A sum over replicas needs dense gradients, too.
        gradients = [
            None if g is None else sum_over_replicas(tf.convert_to_tensor(g)) / replicas
            for g in gradients
        ]
    known = next(gradient for gradient in gradients if gradient is not None)
    zeros = ops.zeros_like(known)
    return StackedGradients(ops.stack([zeros if g is None else g for g in gradients]))


def _stack_sparse(gradients: Sequence[Any]) -> StackedGradients:
    """Sum repeated rows of each task, so that inner products of tasks are exact."""
    import tensorflow as tf

    known = [g for g in gradients if g is not None]
    ids, positions = tf.unique(tf.concat([g.indices for g in known], axis=0))
    rows = tf.shape(ids)[0]
    sizes = [tf.shape(g.indices)[0] for g in known]
    parts = iter(tf.split(positions, sizes, num=len(known)))
    width = known[0].values.shape[1:]
    values = [
        tf.zeros((rows, *width), known[0].values.dtype)
        if g is None
        else tf.math.unsorted_segment_sum(g.values, next(parts), rows)
        for g in gradients
    ]
    return StackedGradients(tf.stack(values), ids, known[0].dense_shape)


def add_gradients(first: Any, second: Any) -> Any:
    """Return the sum of two gradients of one variable, either of which may be None."""
    if first is None or second is None:
        return second if first is None else first
    if name() == "tensorflow":
        import tensorflow as tf

        first, second = tf.convert_to_tensor(first), tf.convert_to_tensor(second)
    return first + second
