"""MMoE(top_k=): only the experts that some gate chose are computed."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MMoE
from tests.support import backends, checks, dispatches, multitask_oracles
from tests.support.checks import array, arrays, check_multi_gate, rows

E = 6
SPARSE = [way for way in dispatches.TOKEN_CHOICE if way != "capacity"]
only_tensorflow = pytest.mark.skipif(
    dispatches.BACKEND != "tensorflow", reason="TensorFlow has eager, graph and XLA"
)


class _Recorder(MLPExperts):
    """Experts that note how many rows each of them is given."""

    def on_pieces(self, pieces, training=None):
        self.sizes = [int(piece.shape[0]) for piece in pieces]
        return super().on_pieces(pieces, training)


def _sparse(top_k=2, tasks=2, experts=None, num_experts=E, **options):
    units = (3, 2) if experts is None else None
    options = {"dtype": "float64", **options}
    return MMoE(num_experts, units, tasks, top_k=top_k, experts=experts, **options)


@pytest.mark.parametrize("way", SPARSE)
@pytest.mark.parametrize(
    ("experts", "tasks", "leading", "options"),
    checks.few_on_jax(
        [
            (None, 1, (5,), {"top_k": 1}),
            (None, 2, (5,), {"gate_use_bias": True}),
            (None, 3, (2, 3), {"gate_temperature": 0.5}),
            (None, 2, (4,), {"top_k": E}),
            (None, 3, (5,), {"top_k": 1, "shared_top_k": 2}),
            (None, 2, (2, 3), {"top_k": 2, "shared_top_k": 1, "gate_temperature": 0.5}),
            (None, 2, (5,), {"top_k": 0, "shared_top_k": 2}),
            (None, 2, (5,), {"top_k": 0, "shared_top_k": 1}),
            (None, 2, (4,), {"top_k": 2, "shared_top_k": E - 2}),
            (None, 2, (4,), {"top_k": 0, "shared_top_k": E}),
            (checks.glu_experts, 2, (5,), {}),
            (checks.layer_experts, 2, (5,), {}),
            (checks.glu_experts, 2, (5,), {"top_k": 1, "shared_top_k": 1}),
        ],
        1,
        4,
    ),
)
def test_every_way_and_all_its_gradients_equal_the_oracle(
    experts, tasks, leading, options, way
):
    if experts is checks.layer_experts and way not in dispatches.UNSTACKED:
        pytest.skip("no kernels to multiply together")
    layer = _sparse(
        tasks=tasks,
        experts=experts and experts(E, 2),
        dispatch=dispatches.dispatch_of(way),
        **options,
    )
    with dispatches.chosen(way):
        check_multi_gate(layer, rows(*leading, 3))


@checks.not_on_jax
@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 6),
    e=st.integers(1, 7),
    k=st.integers(1, 7),
    t=st.integers(1, 3),
    units=st.lists(st.integers(1, 3), min_size=1, max_size=2),
)
def test_any_sizes_of_a_sparse_one_equal_the_oracle(n, e, k, t, units):
    layer = MMoE(e, units, t, top_k=min(k, e), dispatch="split", dtype="float64")
    x = rows(n, 3, seed=n)
    layer.build(x.shape)
    values = checks.randomised(layer)
    expected = multitask_oracles.mmoe(
        x,
        checks.experts_of(layer.experts, values),
        checks.mlps(layer.gates, values),
        top_k=layer.top_k,
    )
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(array(output), wanted, **checks.OUTPUTS)


def _routings():
    """By name: gate kernels (t, d, e), and rows (n, d) that they send somewhere."""
    rng = np.random.default_rng(3)
    random, x = rng.normal(size=(2, E, E)), rng.normal(size=(2 * E, E))
    evenly = np.stack([np.roll(2 * np.eye(E), j, 1) for j in range(2)])
    evenly = evenly + np.roll(evenly, 1, 2) / 2
    all_on_two = np.zeros((2, E, E))
    all_on_two[..., 2], all_on_two[..., 4] = 9.0, 5.0
    return {
        "random": (random, x),
        "uniform": (evenly, np.tile(np.eye(E), (2, 1)) + 0.01 * rng.normal(size=E)),
        "all on the same two experts": (all_on_two, np.abs(x) + 1.0),
        "all tasks choose alike": (np.stack([random[0]] * 2), x),
        "ties": (np.zeros((2, E, E)), x),
        "one row": (random, x[:1]),
        "no row": (random, x[:0]),
    }


ROUTINGS = _routings()


def _routed(name, experts=None, **options):
    """A sparse layer with the gates of `ROUTINGS[name]`, and its rows."""
    kernel, x = ROUTINGS[name]
    layer = _sparse(experts=experts, **options)
    layer.build((None, E))
    checks.randomised(layer)
    layer.gates.kernels[0].assign(kernel)
    return layer, x


def _outputs_and_gradients(layer, x):
    shape = (len(x), 2)
    cotangents = [rows(*shape), rows(*shape, seed=1)]
    found = backends.outputs_and_gradients(layer, [x], cotangents)
    return [part for group in found for part in group]


@pytest.mark.parametrize("budget", [{}, {"top_k": 1, "shared_top_k": 2}])
@pytest.mark.parametrize("way", [way for way in SPARSE if way != "dense"])
@pytest.mark.parametrize(
    "name", ROUTINGS if dispatches.BACKEND != "jax" else ["no row"]
)
def test_any_routing_gives_what_the_dense_one_gives(name, way, budget):
    layer, x = _routed(name, dispatch="dense", **budget)
    wanted = _outputs_and_gradients(layer, x)
    layer.dispatch = dispatches.dispatch_of(way)
    with dispatches.chosen(way):
        found = _outputs_and_gradients(layer, x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **backends.tolerance(1e-9, 1e-11))


@pytest.mark.parametrize("way", SPARSE)
@pytest.mark.parametrize(
    "name",
    ["all tasks choose alike", pytest.param("random", marks=checks.not_on_jax)],
)
def test_a_row_that_is_not_finite_changes_no_other_row(name, way):
    """Also where fewer experts are chosen than there is room for."""
    layer, x = _routed(name, dispatch=dispatches.dispatch_of(way))
    others, broken = np.delete(np.arange(2 * E), [3, 8]), x.copy()
    broken[3], broken[8, 0] = np.nan, np.inf
    with dispatches.chosen(way):
        pairs = zip(arrays(layer(x)), arrays(layer(broken)), strict=True)
    for wanted, found in pairs:
        np.testing.assert_allclose(found[others], wanted[others], **checks.OUTPUTS)
        assert not np.isfinite(found[[3, 8]]).any()


def _compiled(layer, jit, signature):
    """Outputs and gradients of a layer in a graph of TensorFlow, by XLA or not."""
    import tensorflow as tf

    @tf.function(jit_compile=jit, input_signature=signature)
    def call(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x)
            loss = sum(tf.reduce_sum(o * tf.cos(o)) for o in outputs)
        weights = [w.value for w in layer.trainable_variables]
        found = tape.gradient(loss, [x, *weights])
        return [*outputs, *[tf.convert_to_tensor(gradient) for gradient in found]]

    return call


@only_tensorflow
@pytest.mark.parametrize(
    ("way", "jit", "experts"),
    [
        ("split", False, None),
        ("split", False, checks.layer_experts),
        ("in_turn", False, None),
        ("in_turn", True, None),
        ("evenly", True, None),
    ],
)
def test_graph_and_xla_give_what_the_dense_one_gives(way, jit, experts):
    """One graph of an unknown number of rows serves every routing."""
    import tensorflow as tf

    layer, _ = _routed("random", experts and experts(E, 2))
    signature = [tf.TensorSpec([None, E], "float64")]
    call, dense = (_compiled(layer, *how) for how in ((jit, signature), (False, None)))
    for kernel, x in ROUTINGS.values():
        if way == "evenly" and len(x) < 2 * E:
            continue  # XLA compiles each number of rows, for seconds.
        layer.gates.kernels[0].assign(kernel)
        layer.dispatch = "dense"
        wanted = dense(tf.constant(x))
        layer.dispatch = dispatches.dispatch_of(way)
        with dispatches.chosen(way):
            found = call(tf.constant(x))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(dispatches.BACKEND == "jax", reason="split is not for XLA")
@pytest.mark.parametrize("name", ROUTINGS)
def test_layers_of_any_kind_give_what_the_dense_one_gives(name):
    layer, x = _routed(name, checks.layer_experts(E, 2), dispatch="dense")
    wanted = _outputs_and_gradients(layer, x)
    layer.dispatch = "split"
    for a, b in zip(_outputs_and_gradients(layer, x), wanted, strict=True):
        np.testing.assert_allclose(a, b, **backends.tolerance(1e-9, 1e-11))


@only_tensorflow
def test_what_xla_compiled_once_serves_every_routing():
    """As shipped, with the dispatch and the blocks that it chooses itself.

    That XLA compiles once for a shape is counted in `test_moe_compiled.py`.

    In float64: in float32 XLA may round a row's two best gates into another order.
    """
    import tensorflow as tf

    layer = MMoE(16, 2, 2, top_k=1, dtype="float64")
    layer.build((None, E))
    call, dense = _compiled(layer, True, None), _compiled(layer, False, None)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, E))
    assert layer._resolve_dispatch() == "split"
    for batch in (x, x + 5.0, np.ones_like(x), 0.0 * x, np.full_like(x, np.nan)):
        found = call(tf.constant(batch))
        if np.isfinite(batch).all():
            layer.dispatch = "dense"
            wanted = dense(tf.constant(batch))
            layer.dispatch = "auto"
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(dispatches.BACKEND == "jax", reason="split is not for XLA")
@pytest.mark.parametrize("name", ROUTINGS)
def test_a_row_is_computed_once_by_each_expert_that_a_gate_chose(name):
    experts = _Recorder(E, (3, 2), dtype="float64")
    layer, x = _routed(name, experts, dispatch="split")
    layer(x)
    chosen = (array(layer.gate_weights(x)) > 0).any(axis=1)  # (n, e), the union
    assert experts.sizes == chosen.sum(axis=0).tolist()
    assert sum(experts.sizes) <= 4 * len(x)
    if name == "all tasks choose alike":
        assert sum(experts.sizes) == 2 * len(x)
    if name == "all on the same two experts":
        assert experts.sizes == [0, 0, len(x), 0, len(x), 0]


@pytest.mark.skipif(dispatches.BACKEND == "jax", reason="split is not for XLA")
@pytest.mark.parametrize(
    ("num_experts", "tasks", "top_k", "few"),
    [
        (8, 1, 6, True),  # (1 - 6/8)^1 = 1/4 idle
        (8, 1, 7, False),
        (8, 2, 4, True),  # (1 - 4/8)^2 = 1/4
        (8, 2, 5, False),
        (8, 3, 4, False),
    ],
)
def test_auto_is_sparse_where_a_quarter_of_the_experts_would_be_idle(
    num_experts, tasks, top_k, few
):
    experts = _Recorder(num_experts, 2)
    layer = MMoE(num_experts, None, tasks, top_k=top_k, experts=experts)
    layer(rows(5, 3).astype("float32"))
    assert hasattr(experts, "sizes") == few


@checks.not_on_jax
def test_gate_inputs_choose_the_experts_of_a_sparse_one():
    x, gate_x = rows(6, 3), rows(6, 4, seed=1)
    layer = _sparse(top_k=1)
    layer.build(x.shape, gate_x.shape)
    values = checks.randomised(layer)
    experts = checks.experts_of(layer.experts, values)
    gates = checks.mlps(layer.gates, values)
    expected = multitask_oracles.mmoe(x, experts, gates, gate_x, top_k=1)
    for output, wanted in zip(layer(x, gate_x), expected, strict=True):
        np.testing.assert_allclose(array(output), wanted, **checks.OUTPUTS)
    for other in (rows(5, 4), rows(6, 1, 4)):
        with pytest.raises(ValueError, match=r"`gate_inputs`.*\(6, 3\)"):
            layer(x, other)


@pytest.mark.parametrize("way", SPARSE)
def test_all_experts_chosen_is_the_dense_mmoe(way):
    x = rows(5, 3)
    dense = MMoE(4, (3, 2), 2, dtype="float64")
    sparse = MMoE(
        4, (3, 2), 2, top_k=4, dispatch=dispatches.dispatch_of(way), dtype="float64"
    )
    dense.build(x.shape)
    with dispatches.chosen(way):
        sparse.build(x.shape)
        sparse.set_weights(dense.get_weights())
        found = sparse(x)
    for a, b in zip(found, dense(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


@only_tensorflow
@pytest.mark.parametrize("experts", [None, checks.layer_experts])
def test_an_export_serves_any_batch_size(experts, tmp_path):
    import tensorflow as tf

    inputs = keras.Input((E,), dtype="float64")
    layer = _sparse(1, ["a", "b"], experts and experts(12, 2), num_experts=12)
    model = keras.Model(inputs, layer(inputs))
    checks.randomised(layer)
    model.export(tmp_path, verbose=False)
    serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    layer.dispatch = "dense"
    x = rows(300, E)
    for n in (0, 1, 7, 300):
        found, wanted = serve(tf.constant(x[:n])), layer(x[:n])
        assert set(found) == {"a", "b"}
        for name, output in found.items():
            np.testing.assert_allclose(output, array(wanted[name]), **checks.OUTPUTS)


def test_split_under_a_compiler_raises():
    layer = MMoE(6, 2, 2, top_k=1, dispatch="split")
    calls = backends.compiled_calls(layer)
    if not calls:
        pytest.skip("this backend is not compiled here")
    layer.build((None, 3))
    compiler = calls.get("xla") or calls["jit"]
    with pytest.raises(ValueError, match=r'dispatch="split".*jit_compile.*"auto"'):
        compiler(ops.convert_to_tensor(rows(3, 3).astype("float32")))


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="there it is allowed")
def test_ragged_is_refused_off_jax():
    with pytest.raises(ValueError, match=r"ragged"):
        MMoE(6, 2, 2, top_k=1, dispatch="ragged")(rows(3, 3).astype("float32"))
