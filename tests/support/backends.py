"""What a test needs of the backend in use: gradients, and compiled calls."""

import keras
import numpy as np
from keras import ops


def tolerance(rtol, atol=0.0):
    """How near a float64 layer comes to its oracle on this backend."""
    if keras.backend.backend() == "torch":
        # Keras 3.15 multiplies float64 matrices in float32 there.
        rtol, atol = max(rtol, 2e-4), max(atol, 1e-5)
    return {"rtol": rtol, "atol": atol}


def gradients(layer, inputs, cotangents):
    """Gradients of sum(output * cotangent) by the layer's weights and its inputs.

    `inputs` and `cotangents` are lists of arrays; the layer's outputs are flattened
    in the order of `cotangents`. Returns two lists of arrays: weights, inputs.
    """
    return outputs_and_gradients(layer, inputs, cotangents)[1:]


def outputs_and_gradients(layer, inputs, cotangents):
    """Return the flat outputs too: lists of arrays for outputs, weights, inputs."""
    weights = layer.trainable_variables
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    found = run[keras.backend.backend()](layer, weights, inputs, cotangents)
    return tuple(
        [np.asarray(ops.convert_to_numpy(part)) for part in group] for group in found
    )


def _scalar(outputs, cotangents):
    terms = [ops.sum(o * c) for o, c in zip(outputs, cotangents, strict=True)]
    return sum(terms[1:], terms[0])


def _tensorflow(layer, weights, inputs, cotangents):
    import tensorflow as tf

    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = keras.tree.flatten(layer(*inputs))
        loss = _scalar(outputs, cotangents)
    found = tape.gradient(loss, [[w.value for w in weights], inputs])
    return outputs, *[[tf.convert_to_tensor(g) for g in group] for group in found]


def _jax(layer, weights, inputs, cotangents):
    import jax

    def loss(weight_values, inputs):
        outputs, _ = layer.stateless_call(
            weight_values, [v.value for v in layer.non_trainable_variables], *inputs
        )
        outputs = keras.tree.flatten(outputs)
        return _scalar(outputs, cotangents), outputs

    # Compiled as a whole: one by one, JAX compiles every operation for itself.
    call = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    (by_weight, by_input), outputs = call([w.value for w in weights], inputs)
    return outputs, by_weight, by_input


def _torch(layer, weights, inputs, cotangents):
    inputs = [ops.convert_to_tensor(x).requires_grad_() for x in inputs]
    layer.zero_grad()
    outputs = keras.tree.flatten(layer(*inputs))
    _scalar(outputs, [ops.convert_to_tensor(c) for c in cotangents]).backward()
    weights = [w.value for w in weights]

    def gradient(tensor):  # None where nothing that was computed depends on it.
        return ops.zeros_like(tensor) if tensor.grad is None else tensor.grad

    return outputs, [gradient(w) for w in weights], [gradient(x) for x in inputs]


def call(layer, *inputs, **kwargs):
    """Outputs of a layer, which is built first.

    JAX compiles the call as one program: one by one, each operation would be compiled
    for each shape, for seconds.
    """
    if not layer.built:
        layer.build(*[x.shape for x in inputs])
    if keras.backend.backend() != "jax":
        return layer(*inputs, **kwargs)
    import jax

    run = jax.jit(lambda *inputs: layer(*inputs, **kwargs))
    return run(*[ops.convert_to_tensor(x) for x in inputs])


def compiled_calls(layer):
    """The layer as the backend's compilers run it, by the compiler's name."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return {
            "graph": tf.function(layer.__call__),
            "xla": tf.function(layer.__call__, jit_compile=True),
        }
    if backend == "jax":
        import jax

        return {"jit": jax.jit(lambda *inputs: layer(*inputs))}
    return {}
