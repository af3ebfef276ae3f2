"""A step of one Keras layer, the same for this library and for KerasHub.

"training" is the forward and backward pass of a loss with the gradients of the inputs
and of all weights, without optimizer. "forward" is the output in inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(
    layer: Any, x: Any, step: str = "training", compiler: str = "graph"
) -> Callable[[], Any]:
    """Return a function that runs a step and returns when it is done.

    Args:
        layer: a built layer. If it returns a tuple, the first is the output.
        x: NumPy array, the inputs.
        step: "training" or "forward".
        compiler: "graph" or "XLA" on TensorFlow, "XLA" on JAX.
    """
    import keras

    if keras.backend.backend() == "jax":
        return _jax(layer, x, step)
    return _tensorflow(layer, x, step, compiler == "XLA")


def _tensorflow(layer: Any, x: Any, step: str, jit: bool) -> Callable[[], Any]:
    import tensorflow as tf

    weights = [weight.value for weight in layer.trainable_variables]

    def training(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(_output(layer(x, training=True))))
            loss = tf.add_n([loss, *layer.losses])
        return tape.gradient(loss, [x, *weights])

    def forward(x: Any) -> Any:
        return _output(layer(x, training=False))

    chosen = {"training": training, "forward": forward}[step]
    call, rows = tf.function(chosen, jit_compile=jit), tf.constant(x)
    # TensorFlow on a CPU returns when the results are there.
    return lambda: call(rows)


def _jax(layer: Any, x: Any, step: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    fixed = [weight.value for weight in layer.non_trainable_variables]

    def forward(weights: Any, x: Any) -> Any:
        return _output(layer.stateless_call(weights, fixed, x, training=False)[0])

    def loss(weights: Any, x: Any) -> Any:
        outputs, _, losses = layer.stateless_call(
            weights, fixed, x, training=True, return_losses=True
        )
        return jnp.sum(jnp.square(_output(outputs))) + sum(losses)

    chosen = {"training": jax.grad(loss, argnums=(0, 1)), "forward": forward}[step]
    call, rows = jax.jit(chosen), jnp.asarray(x)
    weights = [weight.value for weight in layer.trainable_variables]
    return lambda: jax.block_until_ready(call(weights, rows))


def _output(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs
