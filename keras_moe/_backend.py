"""The few things that keras.ops does not offer and each backend does in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops


def name() -> str:
    """Return "tensorflow", "jax" or "torch"."""
    return keras.backend.backend()


def under_xla() -> bool:
    """Whether what is being traced now will be compiled by XLA."""
    if name() == "jax":
        return True
    if name() != "tensorflow":
        return False
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    # jit_compile=True is told to nested functions and loops by their outer graphs.
    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


def on_accelerator() -> bool:
    """Whether the backend would compute on a GPU or TPU."""
    if name() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    if name() == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices()
        return any(device.device_type in ("GPU", "TPU") for device in devices)
    import torch

    return torch.cuda.is_available()


def has_grouped_matmul() -> bool:
    """Whether `jax.lax.ragged_dot` computes only the rows of each expert here."""
    if name() != "jax":
        return False
    import jax

    return jax.default_backend() == "tpu"


def with_gradient(
    function: Callable[..., Any],
    gradient: Callable[..., Any],
    inputs: Sequence[Any],
    constants: Any,
) -> Any:
    """Return `function(*inputs, constants)` with the gradient `gradient(inputs, up)`.

    Args:
        function: of the inputs and the constants.
        gradient: of `inputs`, `constants` and the gradient of the outcome. Returns a
            tuple of one gradient for each of `inputs`, and must say the same as
            automatic differentiation would: torch takes that one.
        inputs: float tensors.
        constants: tensors without a gradient, in any structure. On JAX neither function
            may use other tensors: what is recomputed would not know them.
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

    # Eagerly Keras hands out the tf.Variable, which a custom gradient refuses.
    return tf.convert_to_tensor(value)


def pullback(
    function: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[Any, Callable[[Any], Sequence[Any]]]:
    """Return `function(*inputs)` and the function from its gradient to theirs."""
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

    Equal scores go to the lower index, which torch's own top-k does not promise.
    """
    if name() != "torch":
        return ops.top_k(scores, k)
    import torch

    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def split_rows(rows: Any, sizes: Any, count: int) -> Sequence[Any]:
    """Cut the first axis into `count` parts of `sizes`, which only the run knows."""
    if name() == "torch":
        import torch

        return torch.split(rows, [int(size) for size in sizes])
    import tensorflow as tf

    return tf.split(rows, sizes, num=count)


def ragged_dot(rows: Any, kernels: Any, sizes: Any) -> Any:
    """(m, in), (e, in, out) -> (m, out): runs of `sizes` rows, one kernel each."""
    import jax

    return jax.lax.ragged_dot(rows, kernels, sizes)


def assert_same_rows(first: Any, second: Any, message: str) -> Any:
    """Return `first`; to use it fails if the first axes differ when it runs.

    Only TensorFlow without XLA has axes that the run alone knows. Nothing orders the
    operations of its graph but what they use: an assertion that nobody uses may come
    after an operation that fails in its own words.
    """
    if name() != "tensorflow" or under_xla():
        return first
    import tensorflow as tf

    sizes = tf.shape(first)[0], tf.shape(second)[0]
    same = tf.debugging.assert_equal(*sizes, message=message)
    # Run at once, it has failed already and is no operation.
    with tf.control_dependencies([] if same is None else [same]):
        return tf.identity(first)


def keras_mask(tensor: Any) -> Any:
    """Return the mask that Keras has attached to a tensor, or None.

    It is an attribute, but on JAX, whose tensors take none.
    """
    from keras.src.backend import get_keras_mask  # Keras does not export it.

    return get_keras_mask(tensor)


def num_replicas() -> int:
    """Return how many replicas of `tf.distribute` compute a step together."""
    if name() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(value: Any) -> Any:
    """Return the sum of what every replica of `tf.distribute` has as `value`."""
    if num_replicas() == 1:
        return value
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)
