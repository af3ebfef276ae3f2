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
    weights = layer.trainable_variables
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    by_weight, by_input = run[keras.backend.backend()](
        layer, weights, inputs, cotangents
    )
    as_arrays = keras.tree.map_structure(
        lambda g: np.asarray(ops.convert_to_numpy(g)), [by_weight, by_input]
    )
    return as_arrays[0], as_arrays[1]


def _scalar(outputs, cotangents):
    flat = keras.tree.flatten(outputs)
    terms = [ops.sum(o * c) for o, c in zip(flat, cotangents, strict=True)]
    return sum(terms[1:], terms[0])


def _tensorflow(layer, weights, inputs, cotangents):
    import tensorflow as tf

    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = _scalar(layer(*inputs), cotangents)
    found = tape.gradient(loss, [[w.value for w in weights], inputs])
    return [[tf.convert_to_tensor(g) for g in group] for group in found]


def _jax(layer, weights, inputs, cotangents):
    import jax

    def loss(weight_values, inputs):
        outputs, _ = layer.stateless_call(
            weight_values, [v.value for v in layer.non_trainable_variables], *inputs
        )
        return _scalar(outputs, cotangents)

    inputs = [ops.convert_to_tensor(x) for x in inputs]
    return jax.grad(loss, argnums=(0, 1))([w.value for w in weights], inputs)


def _torch(layer, weights, inputs, cotangents):
    inputs = [ops.convert_to_tensor(x).requires_grad_() for x in inputs]
    layer.zero_grad()
    _scalar(layer(*inputs), [ops.convert_to_tensor(c) for c in cotangents]).backward()
    return [w.value.grad for w in weights], [x.grad for x in inputs]


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
