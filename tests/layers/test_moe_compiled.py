"""MoE in graphs, under XLA and in `fit`."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.experts import LayerExperts
from keras_moe.layers import MoE
from tests.support import backends, dispatches, processes
from tests.support.moe_layers import (
    D,
    E,
    U,
    array,
    float32_model,
    moe,
    only_tensorflow,
    randomised,
    tokens,
)


def tensorflow_call(layer, jit, signature=None):
    """Output and gradients of a layer by TensorFlow's compilers."""
    import tensorflow as tf

    @tf.function(jit_compile=jit, input_signature=signature)
    def call(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x)
            loss = tf.reduce_sum(outputs * tf.cos(outputs))
        weights = [w.value for w in layer.trainable_variables]
        found = tape.gradient(loss, [x, *weights])
        return [outputs, *[tf.convert_to_tensor(gradient) for gradient in found]]

    return call


@only_tensorflow
@pytest.mark.parametrize("way", dispatches.TOKEN_CHOICE)
def test_eager_graph_and_xla_give_the_same_output_and_gradients(way):
    """With a known number of tokens and without; the numbers are those of "dense"."""
    import tensorflow as tf

    layer = moe(top_k=3)
    layer.build((None, D))
    randomised(layer)
    unknown = [tf.TensorSpec([None, D], "float64")]
    modes = [(False, None), (False, unknown)]
    if way in dispatches.COMPILED:
        modes += [(True, None), (True, unknown)]
    batches = {n: tf.constant(tokens(n)) for n in (9, 1, 0)}
    layer.dispatch = "dense"
    wanted = {n: tensorflow_call(layer, False)(x) for n, x in batches.items()}
    layer.capacity_factor = float(E) if way == "capacity" else None
    layer.dispatch = dispatches.dispatch_of(way)
    with dispatches.chosen(way):
        for jit, signature in modes:
            call = tensorflow_call(layer, jit, signature)
            for n, x in batches.items():
                if signature is None and n != 9:
                    continue
                for a, b in zip(call(x), wanted[n], strict=True):
                    np.testing.assert_allclose(
                        a, b, rtol=1e-9, atol=1e-11, err_msg=f"{jit} {signature} {n}"
                    )


@only_tensorflow
def test_default_blocks_under_xla_for_any_routing():
    """One compiled program serves them: also all tokens on one expert, or NaN."""
    import tensorflow as tf

    layer = MoE(8, (4, U))
    layer.build((None, D))
    call = tensorflow_call(layer, True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, D)).astype("float32")
    for batch in (x, x + 5.0, np.ones_like(x), 0.0 * x, np.full_like(x, np.nan)):
        found = call(tf.constant(batch))
        if np.isfinite(batch).all():
            for a, b in zip(found, tensorflow_call(layer, False)(batch), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


COMPILING = """
import json, sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_moe.layers import MMoE, MoE


def compiled():
    names = Path(sys.argv[1]).glob("module_*before_optimizations.txt")
    return len({name.name.split(".")[0] for name in names})


x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
batches = [x, x + 5.0, np.ones_like(x), 0.0 * x, np.full_like(x, np.nan), x[1:]]
found = []
for layer in (MoE(4, 2), MoE(4, 2, dispatch="capacity"), MMoE(4, 2, 2, top_k=1)):
    layer.build((None, 3))

    @tf.function(jit_compile=True)
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = sum(tf.reduce_sum(y) for y in tf.nest.flatten(layer(x)))
        return tape.gradient(loss, [x, *[w.value for w in layer.trainable_variables]])

    found.append([])
    for batch in batches:
        before = compiled()
        gradients(tf.constant(batch))
        found[-1].append(compiled() - before)
print(json.dumps(found))
"""


@only_tensorflow
def test_xla_compiles_once_for_a_batch_shape(tmp_path):
    """XLA writes down each program that it compiles: MoE, with a capacity, and MMoE.

    The last batch is one row shorter, and shows that what is counted can grow.
    """
    dump = tmp_path / "dump"
    environment = {"XLA_FLAGS": f"--xla_dump_to={dump}"}
    done = processes.run_without([], COMPILING, tmp_path, str(dump), **environment)
    assert json.loads(done.splitlines()[-1]) == [[1, 0, 0, 0, 0, 1]] * 3


@only_tensorflow
@pytest.mark.parametrize("dispatch", ["split", "blocked", "capacity", "dense"])
def test_a_training_graph_has_no_python_operation(dispatch):
    """No Python in the graph, and no value that Python would have to wait for."""
    import tensorflow as tf

    layer = MoE(E, (4, U), dispatch=dispatch)
    layer.build((None, D))
    call = tensorflow_call(layer, False)
    graph = call.get_concrete_function(tf.TensorSpec([None, D])).graph
    operations = {op.type for op in graph.get_operations()}
    for function in graph.as_graph_def().library.function:
        operations |= {node.op for node in function.node_def}
    assert "MatMul" in operations or "BatchMatMulV2" in operations
    asking = {"PyFunc", "PyFuncStateless", "EagerPyFunc", "NumpyFunction"}
    assert not operations & asking


def test_split_under_xla_raises():
    layer = MoE(E, U, dispatch="split")
    calls = backends.compiled_calls(layer)
    if not calls:
        pytest.skip("this backend is not compiled here")
    layer.build((None, D))
    compiler = calls.get("xla") or calls["jit"]
    with pytest.raises(ValueError, match=r'dispatch="split".*jit_compile.*"auto"'):
        compiler(ops.convert_to_tensor(tokens(3).astype("float32")))


FITTED = [False, True] if dispatches.BACKEND == "tensorflow" else ["auto"]
SERVER = """
import json, sys
import numpy as np
import tensorflow as tf

serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
x = np.load(sys.argv[2])
print(json.dumps([serve(tf.constant(x[:n]))["output_0"].numpy().tolist()
                  for n in (0, 1, 7, 300)]))
"""


@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_fit_with_and_without_xla_gives_the_same_served_model(router, tmp_path):
    """The layer is told nothing of compilers, and a server need not have it."""
    if dispatches.BACKEND == "jax" and router == "expert_choice":
        pytest.skip("a model of any batch size has no capacity there")
    x = tokens(300).astype("float32")
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], axis=1)
    histories, outputs = [], []
    for jit in FITTED:
        model, layer = float32_model(router=router, num_shared_experts=1)
        model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit)
        history = model.fit(x, y, 150, epochs=3, shuffle=False, verbose=0).history
        histories.append(history["loss"])
        outputs.append(array(layer(x)))
        assert history["loss"][-1] < history["loss"][0]
    np.testing.assert_allclose(histories[0], histories[-1], rtol=1e-4)
    np.testing.assert_allclose(outputs[0], outputs[-1], rtol=1e-2, atol=1e-3)
    if dispatches.BACKEND != "tensorflow":
        return
    # The one that XLA trained is served without XLA.
    model.export(tmp_path / "model", verbose=False)
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("model", "x.npy")]
    found = processes.run_without(["keras_moe"], SERVER, tmp_path, *paths)
    served = json.loads(found.splitlines()[-1])
    layer.dispatch = "dense"
    for n, rows in zip((0, 1, 7, 300), served, strict=True):
        rows = np.reshape(rows, (n, U))
        np.testing.assert_allclose(rows, array(layer(x[:n])), rtol=1e-3, atol=1e-4)


@only_tensorflow
def test_layers_of_any_kind_train_under_xla_and_are_served(tmp_path):
    import tensorflow as tf

    kinds = [keras.layers.Dense(U), keras.Sequential([keras.layers.Dense(U, "tanh")])]
    inputs = keras.Input((D,))
    layer = MoE(2, top_k=1, experts=LayerExperts(kinds))
    model = keras.Model(inputs, layer(inputs))
    x = tokens(40).astype("float32")
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=True)
    losses = model.fit(x, x[:, :U], 40, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    layer.dispatch = "dense"
    for n in (1, 40):
        np.testing.assert_allclose(served.serve(x[:n]), array(layer(x[:n])), rtol=1e-4)
