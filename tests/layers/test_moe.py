"""MoE against the NumPy oracle: every router by every way that rows can move."""

import json
from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import routers
from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import HierarchicalMoE, MoE
from keras_moe.routing import Routing
from tests import backends, moe_oracles, oracles, processes, routing_oracles, ways
from tests.family import not_on_jax

D, E, U = 3, 4, 2
OUTPUTS = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)
EXPERT_BIAS = np.array([0.3, -0.2, 0.1, -0.4])
NO_LOSSES = {
    f"{name}_loss_weight": 0.0 for name in ("load_balancing", "importance", "load")
}


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def tokens(*leading, seed=0):
    return np.random.default_rng(seed).normal(size=(*leading, D))


class Call(keras.layers.Layer):
    """A MoE that is called with the inputs alone, in training if it is told so."""

    def __init__(self, moe, prepare=None, **given):
        super().__init__(dtype=moe.dtype_policy)
        self.moe, self.prepare, self.given = moe, prepare, given
        self.built = moe.built

    def call(self, x):
        if self.prepare is not None:
            self.prepare()
        return self.moe(x, **self.given)


def randomised(layer, seed=1):
    """Give all weights random values, biases too; return a dict of them by weight.

    With biases at 0 the rows of dead units would lie on the kink of the next ReLU.
    """
    rng = np.random.default_rng(seed)
    values = {}
    for variable in layer.trainable_variables:
        values[id(variable)] = rng.normal(size=variable.shape)
        variable.assign(values[id(variable)])
    return values


def oracle_experts(experts, values):
    """The experts as functions of a row that read `values`."""

    def of(weights):
        return [values[id(weight)] for weight in weights]

    if isinstance(experts, MLPExperts):
        return moe_oracles.mlp_experts(of(experts.kernels), of(experts.biases))
    if isinstance(experts, GLUExperts):
        kernels = [experts.gate_kernel, experts.up_kernel, experts.down_kernel]
        biases = [experts.gate_bias, experts.up_bias, experts.down_bias]
        return moe_oracles.glu_experts(
            of(kernels), of(biases) if experts.use_bias else None
        )

    def dense_layers(weights):  # kernel, bias, kernel, bias, ...
        kernels, biases = weights[::2], weights[1::2]
        return lambda row: oracles.mlp(
            row, kernels, biases, oracles.relu, oracles.linear
        )

    return [dense_layers(of(layer.trainable_variables)) for layer in experts.layers]


def layer_experts():
    def sequence(*units):
        hidden = [keras.layers.Dense(u, "relu") for u in units]
        return keras.Sequential([*hidden, keras.layers.Dense(U)])

    usual = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        layers = [keras.layers.Dense(U), sequence(5), sequence(), sequence(4, 3)]
        return LayerExperts(layers)
    finally:
        keras.config.set_dtype_policy(usual)


def check(layer, names, inputs, expected, values, few=True, **given):
    """Outputs and all gradients of every way are those of `expected(factor)`.

    The way "dropping" is "capacity" where not everybody finds a place.
    """
    call = Call(layer, **given)
    weights = layer.trainable_variables
    parts = ["inputs", *[w.path for w in weights]]
    arrays = [inputs, *[values[id(w)] for w in weights]]
    rng, known = np.random.default_rng(2), {}
    if few and ways.BACKEND == "jax":
        # Each way takes it over a second to compile. This one it alone has.
        names = [name for name in names if name == "ragged"] or names
    cotangent = rng.normal(size=expected(None).shape)
    priority = layer.priority
    for way in names:
        factor = {"capacity": float(E), "dropping": 0.7}.get(way)
        drops = factor if way == "dropping" else None
        layer.priority = "position" if factor is None else priority
        if drops not in known:
            numeric = oracles.numeric_gradients(
                lambda drops=drops: (expected(drops) * cotangent).sum(), arrays
            )
            known[drops] = expected(drops), numeric
        wanted, numeric = known[drops]
        layer.capacity_factor = factor if layer.router.choice == "token" else None
        layer.dispatch = ways.dispatch_of(way)
        with ways.chosen(way):
            outputs, by_weight, by_input = backends.outputs_and_gradients(
                call, [inputs], [cotangent]
            )
        np.testing.assert_allclose(outputs[0], wanted, **OUTPUTS, err_msg=way)
        found = [*by_input, *by_weight]
        for part, gradient, value in zip(parts, found, numeric, strict=True):
            np.testing.assert_allclose(
                gradient, value, **GRADIENTS, err_msg=f"{way}: {part}"
            )


def moe(router=None, experts=None, num_experts=E, **kwargs):
    kwargs = {**NO_LOSSES, "dtype": "float64", **kwargs}
    units = kwargs.pop("units", (4, U)) if experts is None else None
    return MoE(num_experts, units, router=router, experts=experts, **kwargs)


def oracle(layer, x, record, values, factor, mask=None):
    """The output for tokens (n, d), with drops where a capacity factor is given."""
    kept = None
    if factor is not None:
        indices, weights = record["expert_indices"], record["combine_weights"]
        (n, k), e = indices.shape, layer.num_experts
        c = moe_oracles.capacity(n, e, k, Fraction(factor).limit_denominator(100))
        kept, _ = moe_oracles.queue(indices, weights, e, c, layer.priority, mask)
    experts = oracle_experts(layer.experts, values)
    return moe_oracles.moe(x, record, experts, mask, kept)


o = routing_oracles
EVERYBODY = np.ones(9, bool)


def noise(seed, n=9):
    """The first draw of another generator with the router's seed is the router's."""
    return array(
        keras.random.normal(
            (n, E), dtype="float64", seed=keras.random.SeedGenerator(seed)
        )
    )


# Name: the router, its oracle as a function of tokens and weights, whether in training.
ROUTERS = {
    "top-2": (
        lambda: routers.TopKRouter(E, 2, dtype="float64"),
        lambda x, kernel: o.top_k(x, kernel, 2),
        False,
    ),
    "switch": (
        lambda: routers.TopKRouter(E, 1, use_bias=True, dtype="float64"),
        lambda x, kernel, bias: o.top_k(x, kernel, 1, bias, renormalize=False),
        True,
    ),
    "sigmoid": (
        lambda: routers.TopKRouter(E, 3, score_function="sigmoid", dtype="float64"),
        lambda x, kernel: o.top_k(x, kernel, 3, score_function="sigmoid"),
        False,
    ),
    "noisy": (
        lambda: routers.NoisyTopKRouter(E, 2, seed=3, dtype="float64"),
        lambda x, *kernels: o.noisy_top_k(x, *kernels, noise(3), 2),
        True,
    ),
    "bias_balanced": (
        lambda: routers.BiasBalancedRouter(
            E,
            2,
            num_groups=2,
            top_k_groups=1,
            routed_scaling_factor=2.5,
            dtype="float64",
        ),
        lambda x, kernel: o.bias_balanced(x, kernel, EXPERT_BIAS, 2, 2, 1, 2.5),
        True,
    ),
    "sinkhorn": (
        lambda: routers.SinkhornRouter(E, 2, iterations=5, dtype="float64"),
        lambda x, kernel: o.sinkhorn(x, kernel, 2, 5, 1.0, True, EVERYBODY),
        True,
    ),
    "hierarchical": (
        lambda: routers.HierarchicalRouter(2, 2, 2, 1, dtype="float64"),
        lambda x, kernel, kernels: o.hierarchical(x, kernel, kernels, None, None, 2, 1),
        False,
    ),
    "expert_choice": (
        lambda: routers.ExpertChoiceRouter(E, 2, capacity_factor=0.8, dtype="float64"),
        lambda x, kernel: o.expert_choice(x, kernel, 2, 0.8, EVERYBODY),
        True,
    ),
    "dense": (
        lambda: routers.DenseRouter(E, temperature=0.7, dtype="float64"),
        lambda x, kernel: o.dense(x, kernel, 0.7),
        False,
    ),
}
WITH_DROPS = [*ways.TOKEN_CHOICE, "dropping"]
WAYS = {"token": WITH_DROPS, "expert": ways.EXPERT_CHOICE, "all": ["dense"]}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_by_every_way(name):
    check_router(*ROUTERS[name], few=name != "top-2")


def check_router(make, record, training, n=9, few=True, expert_bias=EXPERT_BIAS):
    router, x = make(), tokens(n)
    options = {}
    if training and router.choice == "token":
        options = {"priority": "probability", "dispatch": "capacity"}
    layer = moe(router, **options)
    layer.build(x.shape)
    values = randomised(layer)
    weights = [values[id(w)] for w in router.trainable_variables]

    def expected(factor):
        return oracle(layer, x, record(x, *weights), values, factor)

    def prepare():
        if isinstance(router, routers.NoisyTopKRouter):
            fresh = keras.random.SeedGenerator(3)
            router.seed_generator.state.assign(fresh.state)
        if isinstance(router, routers.BiasBalancedRouter):
            router.expert_bias.assign(expert_bias)

    check(
        layer,
        WAYS[router.choice],
        x,
        expected,
        values,
        few=few,
        prepare=prepare,
        training=training,
    )


ALL_EXPERTS = {
    "noisy": (
        lambda: routers.NoisyTopKRouter(E, E, seed=3, dtype="float64"),
        lambda x, *kernels: o.noisy_top_k(x, *kernels, noise(3, len(x)), E),
        True,
    ),
    "bias_balanced": (
        lambda: routers.BiasBalancedRouter(E, E, dtype="float64"),
        lambda x, kernel: o.bias_balanced(x, kernel, EXPERT_BIAS, E),
        False,
    ),
    "sinkhorn": (
        lambda: routers.SinkhornRouter(E, E, iterations=5, dtype="float64"),
        lambda x, kernel: o.sinkhorn(x, kernel, E, 5, 1.0, True, np.ones(len(x), bool)),
        True,
    ),
    "hierarchical": (
        lambda: routers.HierarchicalRouter(2, 2, 2, 2, dtype="float64"),
        lambda x, kernel, kernels: o.hierarchical(x, kernel, kernels, None, None, 2, 2),
        False,
    ),
    "expert_choice": (
        lambda: routers.ExpertChoiceRouter(E, E, capacity_factor=1.0, dtype="float64"),
        lambda x, kernel: o.expert_choice(x, kernel, E, 1.0, np.ones(len(x), bool)),
        False,
    ),
}


@not_on_jax
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ALL_EXPERTS)
def test_all_experts_and_one_token_by_every_router(name, n):
    check_router(*ALL_EXPERTS[name], n=n)


@not_on_jax
@pytest.mark.parametrize("n", [1, 6])
def test_a_bias_that_sends_all_to_the_same_two_experts(n):
    bias = np.array([0.0, 9.0, 0.0, 9.0])

    def record(x, kernel):
        record = o.bias_balanced(x, kernel, bias, 2)
        assert set(record["expert_indices"].ravel()) == {1, 3}
        return record

    def make():
        return routers.BiasBalancedRouter(E, 2, dtype="float64")

    check_router(make, record, False, n=n, expert_bias=bias)


@not_on_jax
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 10),
    e=st.integers(1, 5),
    share=st.floats(0, 1),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_an_expert_choice_of_any_size(n, e, share, factor, seed):
    """The outputs are the oracle's; both ways have the same gradients."""
    k, x = 1 + int(share * (e - 1)), tokens(n, seed=seed)
    router = routers.ExpertChoiceRouter(e, k, capacity_factor=factor, dtype="float64")
    layer = moe(router, num_experts=e, units=U)
    layer.build(x.shape)
    values = randomised(layer, seed)
    kernel = values[id(router.kernel)]
    record = o.expert_choice(x, kernel, k, factor, np.ones(n, bool))
    wanted, results = oracle(layer, x, record, values, None), []
    for dispatch in ways.EXPERT_CHOICE:
        layer.dispatch = dispatch
        found = backends.outputs_and_gradients(Call(layer), [x], [tokens(n)[:, :U]])
        np.testing.assert_allclose(found[0][0], wanted, **OUTPUTS, err_msg=dispatch)
        results.append([*found[1], *found[2]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, **GRADIENTS)


def test_a_hash_by_every_way():
    layer, x, ids = moe("hash", top_k=2), tokens(9), np.arange(9)
    layer.build(x.shape, ids.shape)
    values = randomised(layer)
    chosen = array(routers.HashRouter(E, 2)(ids).expert_indices)
    record = {"expert_indices": chosen, "combine_weights": np.full((9, 2), 0.5)}
    check(
        layer,
        WITH_DROPS,
        x,
        lambda factor: oracle(layer, x, record, values, factor),
        values,
        router_inputs=ids,
    )


EXPERTS = {
    "one layer": lambda: MLPExperts(E, U, dtype="float64"),
    "three layers": lambda: MLPExperts(E, (4, 3, U), dtype="float64"),
    "no bias": lambda: MLPExperts(E, (4, U), use_bias=False, dtype="float64"),
    "GLU": lambda: GLUExperts(E, 4, U, dtype="float64"),
    "GLU with biases": lambda: GLUExperts(E, 4, U, use_bias=True, dtype="float64"),
    "layers": layer_experts,
}


def check_top_k(layer, x, names=WITH_DROPS, mask=None, few=True):
    """`check` for a layer with a `TopKRouter`, for tokens of any rank."""
    layer.build(x.shape)
    values = randomised(layer)
    kernel = values[id(layer.router.kernel)]
    rows = x.reshape(-1, D)
    row_mask = None if mask is None else mask.reshape(-1)

    def expected(factor):
        k = layer.top_k
        record = routing_oracles.top_k(rows, kernel, k, renormalize=k > 1)
        outputs = oracle(layer, rows, record, values, factor, row_mask)
        return outputs.reshape(*x.shape[:-1], -1)

    check(layer, names, x, expected, values, few=few, mask=mask)


@pytest.mark.parametrize("name", EXPERTS)
def test_every_kind_of_experts_by_every_way(name):
    experts = EXPERTS[name]()
    stacked = hasattr(experts, "on_rows")
    names = WITH_DROPS if stacked else [*ways.UNSTACKED, "dropping"]
    few = name not in ("three layers", "GLU with biases")
    check_top_k(moe(experts=experts), tokens(9), names, few=few)


@pytest.mark.parametrize(
    ("leading", "masked"),
    [
        ((9,), [0]),
        ((9,), [3, 8]),
        ((9,), range(9)),
        ((2, 5), None),
        ((2, 5), [1, 4, 9]),
        ((2, 1, 3), None),
    ],
)
def test_masks_and_leading_axes(leading, masked):
    mask = None
    if masked is not None:
        mask = np.ones(leading, bool)
        mask.reshape(-1)[list(masked)] = False
    check_top_k(moe(), tokens(*leading), mask=mask, few=leading != (2, 5))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 4}, {"num_experts": 7}])
@pytest.mark.parametrize("n", [1, 6])
def test_few_tokens_many_experts_and_all_experts(options, n):
    check_top_k(moe(**options), tokens(n))


@pytest.mark.parametrize(
    "router",
    ["top_k", *[pytest.param(name, marks=not_on_jax)
                for name in ("sinkhorn", "expert_choice", "dense")]],
)  # fmt: skip
def test_one_expert_is_a_plain_mlp(router):
    layer, x = moe(router, num_experts=1, top_k=1), tokens(6)
    layer.build(x.shape)
    values = randomised(layer)
    experts = layer.experts
    kernels = [values[id(w)][0] for w in experts.kernels]
    biases = [values[id(w)][0] for w in experts.biases]

    def expected(factor):
        return oracles.mlp(x, kernels, biases, oracles.relu, oracles.linear)

    names = [way for way in WAYS[layer.router.choice] if way != "dropping"]
    check(layer, names, x, expected, values)


@pytest.mark.parametrize("n", [1, 11])
def test_everything_on_one_expert(n):
    """Expert 2 has all rows, the others none and no gradient."""
    layer, x = moe(top_k=1), tokens(n)
    layer.build(x.shape)
    values = randomised(layer)
    x[:, 0] = 1.0 + np.abs(x[:, 0])
    kernel = values[id(layer.router.kernel)]
    kernel[0] += np.array([0.0, 0.0, 9.0, 0.0])
    layer.router.kernel.assign(kernel)
    record = routing_oracles.top_k(x, kernel, 1, renormalize=False)
    assert (record["expert_indices"] == 2).all()

    def expected(factor):
        record = routing_oracles.top_k(x, kernel, 1, renormalize=False)
        return oracle(layer, x, record, values, factor)

    check(layer, WITH_DROPS, x, expected, values, few=n == 1)


@pytest.mark.parametrize("way", ways.TOKEN_CHOICE)
def test_no_token(way):
    layer = moe(dispatch=ways.dispatch_of(way))
    with ways.chosen(way):
        layer.build((0, D))
        (found,), by_weight, (by_input,) = backends.outputs_and_gradients(
            Call(layer), [tokens(0)], [np.zeros((0, U))]
        )
    assert found.shape == (0, U)
    assert by_input.shape == (0, D)
    assert all((gradient == 0).all() for gradient in by_weight)


# Compilers


def float32_model(**kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((D,))
    layer = MoE(E, (4, U), name="moe", **kwargs)
    return keras.Model(inputs, layer(inputs)), layer


only_tensorflow = pytest.mark.skipif(
    ways.BACKEND != "tensorflow", reason="TensorFlow has eager, graph and XLA"
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
@pytest.mark.parametrize("way", ways.TOKEN_CHOICE)
def test_eager_graph_and_xla_give_the_same_output_and_gradients(way):
    """With a known number of tokens and without; the numbers are those of "dense"."""
    import tensorflow as tf

    layer = moe(top_k=3)
    layer.build((None, D))
    randomised(layer)
    unknown = [tf.TensorSpec([None, D], "float64")]
    modes = [(False, None), (False, unknown)]
    if way in ways.COMPILED:
        modes += [(True, None), (True, unknown)]
    batches = {n: tf.constant(tokens(n)) for n in (9, 1, 0)}
    layer.dispatch = "dense"
    wanted = {n: tensorflow_call(layer, False)(x) for n, x in batches.items()}
    layer.capacity_factor = float(E) if way == "capacity" else None
    layer.dispatch = ways.dispatch_of(way)
    with ways.chosen(way):
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
def test_the_blocks_as_shipped_whatever_the_routing():
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
def test_xla_compiles_once_for_a_batch_shape_whatever_the_routing(tmp_path):
    """XLA writes down each program that it compiles: MoE, with a capacity, and MMoE.

    The last batch is one row shorter, and shows that what is counted can grow.
    """
    dump = tmp_path / "dump"
    environment = {"XLA_FLAGS": f"--xla_dump_to={dump}"}
    done = processes.run_without([], COMPILING, tmp_path, str(dump), **environment)
    assert json.loads(done.splitlines()[-1]) == [[1, 0, 0, 0, 0, 1]] * 3


@only_tensorflow
@pytest.mark.parametrize("dispatch", ["split", "blocked", "capacity", "dense"])
def test_a_training_graph_asks_no_host(dispatch):
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


def test_split_under_xla_says_what_to_do():
    layer = MoE(E, U, dispatch="split")
    calls = backends.compiled_calls(layer)
    if not calls:
        pytest.skip("this backend is not compiled here")
    layer.build((None, D))
    compiler = calls.get("xla") or calls["jit"]
    with pytest.raises(ValueError, match=r'dispatch="split".*jit_compile.*"auto"'):
        compiler(ops.convert_to_tensor(tokens(3).astype("float32")))


FITTED = [False, True] if ways.BACKEND == "tensorflow" else ["auto"]
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
def test_fit_compiled_or_not_gives_the_same_model_and_serves_it(router, tmp_path):
    """The layer is told nothing of compilers, and a server need not have it."""
    if ways.BACKEND == "jax" and router == "expert_choice":
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
    if ways.BACKEND != "tensorflow":
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


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_router_of_a_mixed_layer_is_float32(policy):
    layer = MoE(E, (4, U), dtype=policy)
    seen, compute = [], layer._compute

    def watched(tokens, routing, training):
        seen.append((tokens, routing))
        return compute(tokens, routing, training)

    layer._compute = watched
    outputs = layer(tokens(5).astype("float32"))
    rows, record = seen[-1]
    dtype = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert keras.backend.standardize_dtype(rows.dtype) == dtype
    for tensor in (record.combine_weights, record.router_logits, record.router_probs):
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
    assert all(keras.backend.standardize_dtype(loss.dtype) == "float32"
               for loss in layer.losses)  # fmt: skip
    # A float32 kernel times the tokens as they came, not as half precision would.
    logits = array(ops.cast(rows, "float32")) @ array(layer.router.kernel)
    np.testing.assert_allclose(array(record.router_logits), logits, rtol=1e-5)


@pytest.mark.parametrize("way", ways.TOKEN_CHOICE)
def test_half_precision_is_near_float32(way):
    x = tokens(40).astype("float32")
    reference, half = (
        MoE(E, (8, U), activation="gelu", dtype=dtype)
        for dtype in ("float32", "mixed_bfloat16")
    )
    reference.dispatch = "dense"
    half.capacity_factor = float(E) if way == "capacity" else None
    half.dispatch = ways.dispatch_of(way)
    for layer in (reference, half):
        layer.build(x.shape)
    half.set_weights(reference.get_weights())
    # The router gets what it gets in half precision, or a near choice may fall apart.
    x = array(ops.cast(ops.cast(x, "bfloat16"), "float32"))
    cotangent = np.random.default_rng(0).normal(size=(40, U)).astype("float32")
    wanted = backends.outputs_and_gradients(Call(reference), [x], [cotangent])
    with ways.chosen(way):
        found = backends.outputs_and_gradients(Call(half), [x], [cotangent])
    for group, others in zip(found, wanted, strict=True):
        for a, b in zip(group, others, strict=True):
            scale = np.abs(b).max()
            np.testing.assert_allclose(a.astype("float32"), b, atol=0.03 * scale)


# NaN and infinity


BROKEN = [3, 8]
OTHERS = np.delete(np.arange(12), BROKEN)


def with_broken_rows(x):
    broken = x.copy()
    broken[3], broken[8, 0] = np.nan, np.inf
    return broken


def check_broken_rows(layer, names, **given):
    x = tokens(12)
    for way in names:
        layer.capacity_factor = float(E) if way == "capacity" else None
        if layer.router.choice == "expert":
            # Room for all, or one row less makes room for another.
            layer.capacity_factor = None
            layer.router.capacity_factor = 2.0
        layer.dispatch = ways.dispatch_of(way)
        with ways.chosen(way):
            wanted = array(layer(x, **given))
            found = array(layer(with_broken_rows(x), **given))
        np.testing.assert_allclose(
            found[OTHERS], wanted[OTHERS], **OUTPUTS, err_msg=way
        )
        assert not np.isfinite(found[3]).any()
        assert np.isfinite(wanted).all()


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "bias_balanced", "sinkhorn",
                                    "expert_choice", "hash", "dense"])  # fmt: skip
def test_a_row_that_is_not_finite_changes_no_other_row(router):
    ids = {"router_inputs": np.arange(12)} if router == "hash" else {}
    layer = moe(router, top_k=None if router == "dense" else 2)
    layer.build((12, D), *[(12,)] * len(ids))
    names = WAYS[layer.router.choice]
    check_broken_rows(layer, [name for name in names if name != "dropping"], **ids)


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "bias_balanced", "sinkhorn",
                                    "expert_choice", "dense"])  # fmt: skip
@pytest.mark.parametrize("broken", ["a row", "a column"])
def test_what_the_router_cannot_read_is_the_same_in_every_dispatch(router, broken):
    """The experts see finite features. "dense" gave zeros for an expert choice."""
    layer = moe(router, top_k=None if router == "dense" else 2)
    x = tokens(12)
    layer.build((12, D), (12, D))
    seen = with_broken_rows(x) if broken == "a row" else x
    if broken == "a column":
        kernel = array(layer.router.kernel).copy()
        kernel[:, 1] = np.nan
        layer.router.kernel.assign(kernel)
    found = {}
    for way in WAYS[layer.router.choice]:
        if way == "dropping":
            continue
        layer.capacity_factor = float(E) if way == "capacity" else None
        if layer.router.choice == "expert":
            layer.capacity_factor = None
        layer.dispatch = ways.dispatch_of(way)
        with ways.chosen(way):
            found[way] = array(layer(x, router_inputs=seen))
    first = next(iter(found.values()))
    for way, outputs in found.items():
        np.testing.assert_allclose(outputs, first, **OUTPUTS, err_msg=way)
    if broken == "a row":
        assert np.isnan(first[3]).all()
        assert np.isfinite(first[OTHERS]).all()
    if router == "expert_choice":
        rows = BROKEN if broken == "a row" else np.arange(12)
        assert np.isnan(first[rows]).all()


WITH_PARTS = {
    "two levels": lambda: HierarchicalMoE(2, 2, (4, U), dtype="float64"),
    "GLU": lambda: moe(experts=EXPERTS["GLU"]()),
    "layers": lambda: moe(experts=layer_experts()),
    "shared experts": lambda: moe(num_shared_experts=2),
}


@not_on_jax
@pytest.mark.parametrize("name", WITH_PARTS)
def test_a_row_that_is_not_finite_changes_no_other_row_in_any_experts(name):
    layer = WITH_PARTS[name]()
    layer.build((12, D))
    names = ways.UNSTACKED if name == "layers" else ways.TOKEN_CHOICE
    check_broken_rows(layer, names)


COMPETING = {
    "position": ({"capacity_factor": 0.6, "priority": "position"}, False),
    "probability": ({"capacity_factor": 0.6, "priority": "probability"}, False),
    "expert_choice": ({"router": "expert_choice", "capacity_factor": 0.7}, False),
    "sinkhorn": ({"router": "sinkhorn"}, True),
}


@not_on_jax
@pytest.mark.parametrize("name", COMPETING)
def test_a_row_that_is_not_finite_is_padding_to_those_it_competes_with(name):
    options, training = COMPETING[name]
    layer, x = moe(**options), tokens(12)
    layer.build(x.shape)
    mask = np.ones(12, bool)
    mask[BROKEN] = False
    found = array(layer(with_broken_rows(x), training=training))
    wanted = array(layer(x, mask=mask, training=training))
    np.testing.assert_allclose(found[OTHERS], wanted[OTHERS], **OUTPUTS)
    assert not np.isfinite(found[BROKEN]).any()
    # They do compete: with all rows whole, some other has something else.
    whole = array(layer(x, training=training))
    assert not np.allclose(whole[OTHERS], wanted[OTHERS])


@pytest.mark.parametrize("way", ways.TOKEN_CHOICE)
@pytest.mark.parametrize("kind", ["three layers", "GLU", "layers"])
def test_nan_in_padding_reaches_nothing(kind, way):
    if kind == "layers" and way not in ways.UNSTACKED:
        pytest.skip("no kernels to multiply together")
    experts = EXPERTS[kind]()
    x, mask = tokens(2, 6), np.ones((2, 6), bool)
    mask[0, 3:] = mask[1, 0] = False
    x[~mask] = np.nan
    layer = MoE(E, experts=experts, dtype="float64", dispatch=ways.dispatch_of(way))
    layer.build(x.shape)
    with ways.chosen(way):
        (outputs,), by_weight, (by_input,) = backends.outputs_and_gradients(
            Call(layer, mask=mask), [x], [np.ones((2, 6, U))]
        )
        layer(x, mask=mask)
    assert (outputs[~mask] == 0).all()
    assert np.isfinite(outputs).all()
    assert (by_input[~mask] == 0).all()
    for gradient in [*by_weight, by_input]:
        assert np.isfinite(gradient).all()
    assert all(np.isfinite(array(loss)) for loss in layer.losses)


# Losses, shared experts, the parts that are given


def loss_values(layer):
    return sorted(float(array(loss)) for loss in layer.losses)


def test_the_losses_have_their_weights():
    x = tokens(9)
    mask = np.ones(9, bool)
    mask[4] = False
    layer = moe(
        load_balancing_loss_weight=0.5,
        importance_loss_weight=0.25,
        router_z_loss_weight=2.0,
        entropy_loss_weight=-0.125,
    )
    layer(x, mask=mask)
    record = routing_oracles.top_k(x, array(layer.router.kernel), 2)
    probs, indices = record["router_probs"], record["expert_indices"]
    gates = np.zeros((9, E))
    for i, j in np.ndindex(9, 2):
        gates[i, indices[i, j]] = record["combine_weights"][i, j]
    wanted = [
        0.5 * o.load_balancing_loss(probs, indices, mask),
        0.25 * o.cv_squared_of_sums(gates, mask),
        2.0 * o.router_z_loss(record["router_logits"], mask),
        -0.125 * o.entropy_loss(probs, mask),
    ]
    np.testing.assert_allclose(
        loss_values(layer), sorted(wanted), **backends.tolerance(1e-6)
    )


@pytest.mark.parametrize(
    ("router", "names"),
    [
        (None, {"load_balancing"}),
        ("noisy_top_k", {"importance", "load"}),
        ("bias_balanced", set()),
        ("expert_choice", set()),
        ("hash", set()),
        ("dense", set()),
    ],
)
def test_the_losses_of_a_router_by_default(router, names):
    layer = MoE(E, U, router=router)
    assert set(layer.loss_weights) == names
    given = {"router_inputs": np.arange(5)} if router == "hash" else {}
    x = tokens(5).astype("float32")
    layer(x, training=True, **given)
    assert len(layer.losses) == len(names)
    layer(x, **given)
    # The load is that of the noise, and in inference there is none.
    assert len(layer.losses) == len(names - {"load"})


def test_the_losses_reach_the_router_in_fit():
    """Without a task, the balance is all there is to learn."""
    x = (tokens(128) + np.array([2.0, 0, 0])).astype("float32")
    model, layer = float32_model(load_balancing_loss_weight=10.0)
    model.compile(keras.optimizers.Adam(0.05), loss=lambda y, p: ops.mean(0.0 * p))
    before = [array(w) for w in layer.experts.weights]
    losses = model.fit(x, x[:, :U], 128, epochs=30, verbose=0).history["loss"]
    assert losses[0] > 10.5
    assert losses[-1] < losses[0] - 0.2
    assert losses[-1] > 9.5
    for a, b in zip(layer.experts.weights, before, strict=True):
        assert (array(a) == b).all()


def test_shared_experts_see_every_token():
    x, mask = tokens(9), np.arange(9) != 2
    layer = moe(num_shared_experts=2)
    layer.build(x.shape)
    values = randomised(layer)
    kernel = values[id(layer.router.kernel)]
    experts, shared = (
        oracle_experts(part, values) for part in (layer.experts, layer.shared_experts)
    )

    def expected(factor):
        record = routing_oracles.top_k(x, kernel, 2)
        return moe_oracles.moe(x, record, experts, mask, shared=shared)

    names = ["dense", *ways.DROPLESS]
    check(layer, names, x, expected, values, mask=mask)


def test_shared_experts_start_unlike_the_others():
    for initializer in (keras.initializers.GlorotUniform(seed=1), "glorot_uniform"):
        layer = MoE(2, (4, U), num_shared_experts=2, kernel_initializer=initializer)
        layer.build((None, D))
        pairs = zip(layer.experts.kernels, layer.shared_experts.kernels, strict=True)
        for routed, shared in pairs:
            assert (array(routed) != array(shared)).all()


def test_a_file_keeps_the_parts_that_were_given(tmp_path):
    def model_of(**kwargs):
        inputs = keras.Input((D,))
        return keras.Model(inputs, MoE(E, name="moe", **kwargs)(inputs))

    given = {
        "parts": {
            "router": routers.TopKRouter(E, 3, score_function="sigmoid"),
            "experts": GLUExperts(E, 4, U),
            "num_shared_experts": 1,
        },
        "layers": {
            "experts": LayerExperts([keras.layers.Dense(U) for _ in range(E)]),
            "dispatch": "dense",
            "top_k": 1,
        },
        "drops": {
            "expert_units": [4, U],
            "capacity_factor": 0.75,
            "priority": "probability",
            "load_balancing_loss_weight": 0.5,
        },
    }
    x = tokens(9).astype("float32")
    for name, kwargs in given.items():
        model = model_of(**kwargs)
        model.save(tmp_path / f"{name}.keras")
        again = keras.models.load_model(tmp_path / f"{name}.keras")
        np.testing.assert_allclose(array(again(x)), array(model(x)), rtol=1e-6)
        layer, other = model.get_layer("moe"), again.get_layer("moe")
        # In the file: before, shapes of parts were tuples, and now they are lists.
        assert json.dumps(other.get_config()) == json.dumps(layer.get_config())
        assert other.loss_weights == layer.loss_weights
        assert loss_values(other) == pytest.approx(loss_values(layer))


@pytest.mark.parametrize("way", ways.TOKEN_CHOICE)
def test_the_dispatch_may_be_changed_after_training(way):
    layer, x = moe(), tokens(9)
    expected = array(layer(x))
    weights = [array(w) for w in layer.weights]
    layer.capacity_factor = float(E) if way == "capacity" else None
    layer.dispatch = ways.dispatch_of(way)
    with ways.chosen(way):
        np.testing.assert_allclose(array(layer(x)), expected, **OUTPUTS)
    for a, b in zip(layer.weights, weights, strict=True):
        assert (array(a) == b).all()
    again = MoE.from_config(layer.get_config())
    assert again.dispatch == ways.dispatch_of(way)
    again.build(x.shape)
    again.set_weights(weights)
    with ways.chosen(way):
        np.testing.assert_allclose(array(again(x)), expected, **OUTPUTS)


def test_auto_obeys_a_capacity_also_if_all_experts_are_chosen():
    layer, x = moe(num_experts=2, top_k=2, capacity_factor=0.5), tokens(8)
    layer.build(x.shape)
    layer.router.kernel.assign(np.zeros((D, 2)))
    # c = 0.5 * 2 * 8 / 2 = 4: the last four tokens find both experts full.
    found = array(layer(x)).any(axis=1)
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]


def test_the_capacity_by_default_is_a_quarter_above_an_even_load():
    layer, x = moe(top_k=1, dispatch="capacity", activation="tanh"), tokens(16)
    layer.build(x.shape)
    layer.router.kernel.assign(np.zeros((D, E)))
    # All tokens want expert 0, which has c = 1.25 * 1 * 16 / 4 = 5 slots.
    assert np.flatnonzero(array(layer(x)).any(axis=1)).tolist() == [0, 1, 2, 3, 4]
    # Tokens that are not finite want it too, but push nobody out.
    x[[0, 3]] = np.nan
    found = array(layer(x))
    assert np.isnan(found[[0, 3]]).all()
    whole = np.nan_to_num(found).any(axis=1)
    assert np.flatnonzero(whole).tolist() == [1, 2, 4, 5, 6]


def test_dropout_is_only_for_training():
    x = tokens(30).astype("float32")
    for experts in (
        MLPExperts(E, (16, U), dropout=0.5, seed=0),
        GLUExperts(E, 16, U, dropout=0.5, seed=0),
    ):
        layer = MoE(E, experts=experts)
        for dispatch in ("auto", "dense", "blocked", "capacity"):
            layer.dispatch = dispatch
            still = array(layer(x))
            assert (array(layer(x)) == still).all()
            moved = array(layer(x, training=True))
            assert not np.allclose(moved, still)
            assert np.isfinite(moved).all()


# What is hashed, and masks of Keras


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)])
def test_ids_have_the_leading_axes(shape):
    x = tokens(*shape)
    ids = np.arange(6).reshape(shape)
    layer = moe("hash")
    flat = array(layer(x.reshape(6, D), router_inputs=np.arange(6)))
    for shaped in (ids, ids[..., None]):
        found = array(layer(x, router_inputs=shaped))
        np.testing.assert_allclose(found.reshape(6, U), flat, **OUTPUTS)


def test_a_router_may_see_something_else():
    x, other = tokens(2, 3), np.random.default_rng(5).normal(size=(2, 3, 7))
    layer = moe()
    layer(x, router_inputs=other)
    values = randomised(layer)
    rows = other.reshape(6, 7)
    record = routing_oracles.top_k(rows, values[id(layer.router.kernel)], 2)
    wanted = moe_oracles.moe(
        x.reshape(6, D), record, oracle_experts(layer.experts, values)
    )
    found = array(layer(x, router_inputs=other)).reshape(6, U)
    np.testing.assert_allclose(found, wanted, **OUTPUTS)


@pytest.mark.parametrize("router", ["top_k", "hash"])
def test_the_mask_of_an_embedding_is_found(router):
    """Keras hands it over itself only where a call has no second tensor."""
    ids = keras.Input((3,), dtype="int32")
    embedded = keras.layers.Embedding(10, D, mask_zero=True)(ids)
    given = {"router_inputs": ids} if router == "hash" else {}
    outputs = MoE(E, U, router=router, kernel_initializer="ones")(embedded, **given)
    model = keras.Model(ids, outputs)
    found = array(model(np.array([[1, 2, 0], [3, 0, 0]])))
    assert (found == 0).all(axis=-1).tolist() == [
        [False, False, True],
        [False, True, True],
    ]


# Bad input


def refused(message, *arguments, **kwargs):
    return pytest.param(arguments, kwargs, message, id=message.replace("`", "")[:40])


def glu(e):
    return GLUExperts(e, 4, U)


def layers_of(e):
    return LayerExperts([keras.layers.Dense(U) for _ in range(e)])


BAD = [
    refused("`num_experts`.*0", 0, U),
    *[
        refused("`top_k` must not exceed.*top_k=5, num_experts=4", E, U, 5,
                router=router)
        for router in (None, "dense", "hash", routers.TopKRouter(E, 2),
                       routers.DenseRouter(E))
    ],
    refused("`top_k` must be None.*'dense'.*top_k=2", E, U, 2, router="dense"),
    refused("`top_k`.*0", E, U, 0, router="dense"),
    refused("`top_k` must be None or equal.*top_k=3, router.top_k=2", E, U, 3,
            router=routers.TopKRouter(E, 2)),
    refused("`expert_units` must be given.*or `experts`", E),
    refused(r"`expert_units\[1\]`", E, (4, 0)),
    refused("`router` must be one of.*'top_k'.*'hash'.*'top-k'", E, U, router="top-k"),
    refused("`router` must route to `num_experts`.*num_experts=4.*num_experts=6", E, U,
            router=routers.TopKRouter(6, 2)),
    refused("`router` must be a layer of keras_moe.routers.*Dense", E, U,
            router=keras.layers.Dense(4)),
    refused("`router` must be one of.*class", E, U, router=routers.TopKRouter),
    refused("`activation` must be the name.*PReLU", E, U,
            activation=keras.layers.PReLU()),
    refused("`dispatch` must be one of.*'split'.*'fast'", E, U, dispatch="fast"),
    *[
        refused(f"`dispatch` must be one of.*ExpertChoiceRouter.*dispatch='{name}'",
                E, U, router="expert_choice", dispatch=name)
        for name in ("split", "blocked", "ragged")
    ],
    refused("`dispatch` must be one of.*DenseRouter.*'capacity'", E, U, router="dense",
            dispatch="capacity"),
    refused("`dispatch` must not be 'blocked'.*LayerExperts", 2, experts=layers_of(2),
            dispatch="blocked"),
    refused("`dispatch` must not be 'ragged'.*LayerExperts", 2, experts=layers_of(2),
            dispatch="ragged"),
    *[
        refused(f"`capacity_factor` needs.*=1.5, dispatch='{name}'", E, U,
                capacity_factor=1.5, dispatch=name)
        for name in ("dense", "split", "blocked", "ragged")
        if name != "ragged" or ways.BACKEND == "jax"  # Elsewhere that comes first.
    ],
    refused("`capacity_factor` needs.*DenseRouter", E, U, router="dense",
            capacity_factor=1.5),
    refused("`capacity_factor` must be set on", E, U, capacity_factor=1.5,
            router=routers.ExpertChoiceRouter(E, 2)),
    refused("`capacity_factor`.*0", E, U, capacity_factor=0),
    refused("`priority` must be one of.*'first'", E, U, priority="first"),
    *[
        refused(f"`priority` needs.*='probability', dispatch='{name}'", E, U,
                priority="probability", dispatch=name)
        for name in ("auto", "dense", "split", "blocked")
    ],
    refused("`priority` needs.*ExpertChoiceRouter", E, U, priority="probability",
            router="expert_choice", dispatch="capacity"),
    refused("`experts` must be a layer of keras_moe.experts.*Dense", E,
            experts=keras.layers.Dense(U)),
    refused("`num_experts` must be the number.*=4, experts.num_experts=3", E,
            experts=glu(3)),
    refused("`expert_units` must be None.*`experts`.*=8", E, 8, experts=glu(E)),
    refused("`num_shared_experts`.*-1", E, U, num_shared_experts=-1),
    refused("`num_shared_experts` needs.*=1.*LayerExperts", 2, experts=layers_of(2),
            num_shared_experts=1),
    refused("`load_loss_weight` must be 0.*TopKRouter.*=0.1", E, U,
            load_loss_weight=0.1),
    refused("`load_balancing_loss_weight` must be 0.*HashRouter", E, U, router="hash",
            load_balancing_loss_weight=0.1),
    refused("`router_z_loss_weight` must be a finite number.*nan", E, U,
            router_z_loss_weight=float("nan")),
    refused("`routing_metrics` must not hold.*router_entropy.*HashRouter", E, U,
            router="hash", routing_metrics=["router_entropy"]),
    refused("must.*'load'.*", E, U, routing_metrics=["load"]),
    refused("`dropout`.*1", E, U, dropout=1),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kwargs", "message"), BAD)
def test_bad_arguments_are_named(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoE(*arguments, **kwargs)


def test_bad_inputs_are_named():
    x, layer = tokens(2, 3), moe()
    with pytest.raises(ValueError, match=r"`mask`.*\(2, 3\).*\(2,\)"):
        layer(x, mask=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"`mask`.*\(1, 3\).*\(1,\)"):
        layer(x[:1], mask=np.ones(1, bool))
    with pytest.raises(ValueError, match=r"`router_inputs`.*\(2, 3\).*\(2, 2, 3\)"):
        layer(x, router_inputs=x[:, :2])
    with pytest.raises(ValueError, match="rank >= 2"):
        moe()(np.ones(3))
    with pytest.raises(ValueError, match=r"`router_inputs` must be given.*HashRouter"):
        moe("hash")(x)
    hashed = moe("hash")
    hashed(x, router_inputs=np.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match=r"integer ids.*`router_inputs`.*float64"):
        hashed(x)


class ByParity(routers.Router):
    """A router of one's own: even ids go to one expert, odd ids to another."""

    reads_ids, has_probs = True, False

    def call(self, tokens, mask=None, training=None):
        indices = ops.expand_dims(ops.mod(tokens, 2), -1)
        return Routing(indices, ops.ones_like(indices, dtype="float32"), mask=mask)


def test_the_attributes_of_a_router_of_ones_own_are_read():
    layer, x, ids = moe(ByParity(E, 1)), tokens(5), np.array([0, 1, 3, 2, 4])
    with pytest.raises(ValueError, match=r"`router_inputs` must be given.*ByParity"):
        layer(x)
    with pytest.raises(ValueError, match=r"`routing_metrics` must not hold.*ByParity"):
        moe(ByParity(E, 1), routing_metrics=["router_entropy"])
    every = array(layer.experts(x))  # (n, e, u)
    found = array(layer(x, router_inputs=ids.astype("int32")))
    np.testing.assert_allclose(found, every[np.arange(5), ids % 2], rtol=1e-6)


def test_a_dispatch_that_does_not_fit_is_refused_later_too():
    layer = MoE(E, U, capacity_factor=1.5)
    with pytest.raises(ValueError, match=r"`capacity_factor`.*dispatch='dense'"):
        layer.dispatch = "dense"
    assert layer.dispatch == "auto"
    with pytest.raises(ValueError, match=r"`capacity_factor`.*-3"):
        layer.capacity_factor = -3
    assert layer.capacity_factor == 1.5
    layer.capacity_factor = None
    layer.dispatch = "dense"


def test_top_k_is_that_of_a_router_that_was_given():
    router = routers.TopKRouter(E, 3)
    assert MoE(E, U, router=router).top_k == 3
    assert MoE(E, U, 3, router=routers.TopKRouter(E, 3)).top_k == 3
    assert MoE(E, U).top_k == 2


@pytest.mark.skipif(ways.BACKEND == "jax", reason="there it is allowed")
def test_ragged_is_refused_off_jax():
    with pytest.raises(ValueError, match=r"'ragged' only on.*'jax'"):
        MoE(E, U, dispatch="ragged")


@pytest.mark.skipif(ways.BACKEND != "jax", reason="refused in __init__ elsewhere")
def test_ragged_is_refused_without_a_grouped_matmul():
    layer = MoE(E, U, dispatch="ragged")
    with pytest.raises(ValueError, match=r'needs a device.*`layer.dispatch = "auto"`'):
        layer(tokens(3))
