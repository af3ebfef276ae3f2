"""MMoE and OMoE against the NumPy oracle, and by hand."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import PLE, STEM, AdaTT, DSelectK, HoME, MMoE, MoE, OMoE
from tests.support import backends, checks, oracles
from tests.support.checks import array, check_multi_gate, rows


def _weights(layer):
    """Random float64 values for every weight, biases too, and the layer told them."""
    rng = np.random.default_rng(1)
    values = [rng.normal(size=w.shape) for w in layer.trainable_variables]
    for variable, value in zip(layer.trainable_variables, values, strict=True):
        variable.assign(value)
    by_path = dict(
        zip([w.path for w in layer.trainable_variables], values, strict=True)
    )

    def pick(owner, kind):
        return [v for p, v in by_path.items() if f"{owner}/{kind}_" in p]

    return (
        values,
        pick("experts", "kernel"),
        pick("experts", "bias"),
        pick("gates", "kernel"),
    )


def _built(layer, rows=3):
    x = np.random.default_rng(0).normal(size=(rows, 6)).astype("float32")
    layer.build(x.shape)
    return x


@pytest.mark.parametrize(
    ("units", "options"),
    [
        ((5,), {}),
        ((6, 5), {}),
        ((6, 4, 5), {"gate_units": (4,)}),
        ((6, 5), {"gate_temperature": 0.3}),
        ((6, 5), {"top_k": 2}),
        ((6, 5), {"gate_x": True}),
    ],
)
def test_outputs_and_all_gradients_equal_the_oracle(units, options):
    options = dict(options)
    separate_gates = options.pop("gate_x", False)
    layer = MMoE(3, units, ["a", "b"], dtype="float64", **options)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(4, 3))]
    if separate_gates:
        inputs.append(rng.normal(size=(4, 2)))
    layer.build(*[x.shape for x in inputs])
    values, kernels, biases, gate_kernels = _weights(layer)
    cotangents = [rng.normal(size=(4, 5)) for _ in range(2)]

    def oracle():
        return oracles.mmoe(
            inputs[0],
            kernels,
            biases,
            gate_kernels,
            gate_x=inputs[1] if separate_gates else None,
            temperature=options.get("gate_temperature", 1.0),
            top_k=options.get("top_k"),
        )

    outputs = layer(*inputs)
    for output, expected in zip(outputs.values(), oracle(), strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(output), expected, **checks.OUTPUTS
        )

    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum((o * c).sum() for o, c in zip(oracle(), cotangents, strict=True)),
        values + inputs,
    )
    for found, wanted in zip([*by_weight, *by_input], expected, strict=True):
        np.testing.assert_allclose(found, wanted, **checks.GRADIENTS)


@checks.not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    d=st.integers(1, 4),
    e=st.integers(1, 5),
    t=st.integers(1, 3),
    units=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_any_sizes_equal_the_oracle(n, d, e, t, units):
    layer = MMoE(e, units, t, dtype="float64")
    x = np.random.default_rng(n).normal(size=(n, d))
    layer.build(x.shape)
    _, kernels, biases, gate_kernels = _weights(layer)
    expected = oracles.mmoe(x, kernels, biases, gate_kernels)
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(output), wanted, **checks.OUTPUTS
        )


def test_by_hand():
    """Two experts 2x and -x + 1 of one unit; gates e^(±x) / (e^x + e^-x).

    At x = 0 both gates are 1/2: y = 1/2 * 0 + 1/2 * 1 = 0.5 for both tasks.
    At x = ln(3)/2 task "a" weighs expert 0 by sqrt3 / (sqrt3 + 1/sqrt3) = 3/4, task
    "b" by 1/4; the experts are ln 3 and 1 - ln(3)/2.
    """
    layer = MMoE(2, 1, ["a", "b"], activation="linear", dtype="float64")
    x = np.array([[0.0], [np.log(3) / 2]])
    layer.build(x.shape)
    layer.experts.kernels[0].assign([[[2.0]], [[-1.0]]])
    layer.experts.biases[0].assign([[0.0], [1.0]])
    layer.gates.kernels[0].assign([[[1.0, -1.0]], [[-1.0, 1.0]]])
    first, second = np.log(3), 1 - np.log(3) / 2
    outputs = {k: ops.convert_to_numpy(v).ravel() for k, v in layer(x).items()}
    np.testing.assert_allclose(outputs["a"], [0.5, 0.75 * first + 0.25 * second])
    np.testing.assert_allclose(outputs["b"], [0.5, 0.25 * first + 0.75 * second])


def test_gates_and_experts_start_different():
    layer = MMoE(
        3,
        (8, 8),
        2,
        kernel_initializer=keras.initializers.GlorotUniform(seed=1),
        gate_kernel_initializer=keras.initializers.GlorotUniform(seed=1),
    )
    layer.build((None, 8))
    draws = [
        part
        for kernel in [*layer.experts.kernels, *layer.gates.kernels]
        for part in ops.convert_to_numpy(kernel)
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert a.shape != b.shape or not np.allclose(a, b)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graph"
)
@pytest.mark.parametrize("num_experts", [2, 16])
def test_the_number_of_matmuls_does_not_grow_with_experts(num_experts):
    """Two expert layers, the gates and the mixture: four, forward."""
    import tensorflow as tf

    layer = MMoE(num_experts, (8, 4), ["a", "b", "c"])
    layer.build((None, 6))
    traced = tf.function(layer).get_concrete_function(tf.TensorSpec((None, 6)))
    kinds = [op.type for op in traced.graph.get_operations()]
    assert sum("MatMul" in kind for kind in kinds) == 4


def test_default_names_are_readable():
    keras.backend.clear_session()
    assert [MMoE(2, 2, 2).name for _ in range(2)] == ["mmoe", "mmoe_1"]
    assert [OMoE(2, 2, 2).name for _ in range(2)] == ["omoe", "omoe_1"]
    assert MMoE(2, 2, 2, name="given").name == "given"


def test_gate_weights_are_what_call_uses():
    layer = MMoE(4, 5, ["a", "b"], gate_dropout=0.5)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    outputs = layer(x)
    weights = ops.convert_to_numpy(layer.gate_weights(x))
    experts = ops.convert_to_numpy(layer.experts(x))
    assert weights.shape == (3, 2, 4)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs["b"]),
        (weights[:, 1, :, None] * experts).sum(1),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", [MMoE, OMoE])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_gate_learns_for_every_top_k(kind, top_k):
    """A single weight is not renormalised: it was always 1, with a gradient of 0."""
    layer = kind(5, 4, 2, top_k=top_k, dtype="float64")
    x = rows(6, 3)
    layer.build(x.shape)
    by_weight, _ = backends.gradients(layer, [x], [np.ones((6, 4)), np.ones((6, 4))])
    by_path = dict(
        zip([w.path for w in layer.trainable_variables], by_weight, strict=True)
    )
    gates = [np.abs(g) for path, g in by_path.items() if "gates" in path]
    assert gates
    for gradient in gates:
        assert gradient.max() > 1e-3
    sums = array(layer.gate_weights(x)).sum(axis=-1)
    if top_k == 1:
        assert (sums < 1).all()
        assert (sums > 1 / 5).all()
    else:
        np.testing.assert_allclose(sums, 1, **checks.OUTPUTS)


def test_top_k_keeps_exactly_k_even_among_ties():
    layer = MMoE(5, 4, 2, top_k=2, gate_kernel_initializer="zeros")
    weights = ops.convert_to_numpy(layer.gate_weights(_built(layer)))
    assert ((weights > 0).sum(-1) == 2).all()
    np.testing.assert_allclose(weights.max(-1), 0.5)


def test_gate_dropout_renormalises_and_never_drops_all():
    """With rate 0.9 and 2 experts, 81% of the rows lose both and must keep both."""
    layer = MMoE(2, 1, 1, gate_dropout=0.9, seed=0, gate_kernel_initializer="zeros")
    x = _built(layer, rows=2000)
    weights = ops.convert_to_numpy(layer._gate(x, training=True))
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    both = np.isclose(weights, 0.5).all(-1).mean()
    one = np.isclose(weights, 1.0).any(-1).mean()
    # 0.1 * 0.1 keep both and 0.9 * 0.9 lose both; 2 * 0.1 * 0.9 keep one.
    assert abs(both - 0.82) < 0.03
    assert abs(one - 0.18) < 0.03


def test_lower_temperature_sharpens():
    sharp = MMoE(4, 2, 1, gate_temperature=0.1)
    even = MMoE(4, 2, 1, gate_temperature=10.0)
    x = _built(sharp)
    _built(even)
    even.set_weights(sharp.get_weights())
    sharp_max = ops.convert_to_numpy(sharp.gate_weights(x)).max(-1)
    even_max = ops.convert_to_numpy(even.gate_weights(x)).max(-1)
    assert (sharp_max > even_max).all()


def test_gates_stay_float32_in_half_precision():
    layer = MMoE(4, 5, 2, dtype="mixed_float16")
    weights = layer.gate_weights(_built(layer))
    assert keras.backend.standardize_dtype(weights.dtype) == "float32"


def test_a_row_of_nan_stays_in_its_row():
    layer = MMoE(4, 5, ["a"])
    x = _built(layer)
    expected = ops.convert_to_numpy(layer(x)["a"])
    x[1] = np.nan
    found = ops.convert_to_numpy(layer(x)["a"])
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("kind", "tasks", "leading", "options"),
    checks.few_on_jax(
        [
            (MMoE, 1, (4,), {"gate_units": (3,), "gate_use_bias": True}),
            (MMoE, 3, (2, 3), {}),
            (OMoE, 1, (4,), {}),
            (OMoE, 2, (4,), {"gate_units": (3,), "gate_use_bias": True}),
            (OMoE, 3, (2, 3), {"gate_temperature": 0.5}),
            (OMoE, 2, (4,), {"top_k": 2}),
            (OMoE, 2, (4,), {"top_k": 1, "dispatch": "dense"}),
        ],
        3,
        5,
    ),
)
def test_one_gate_or_one_a_task_equal_the_oracle(kind, tasks, leading, options):
    check_multi_gate(
        kind(4, (3, 2), tasks, dtype="float64", **options), rows(*leading, 3)
    )


@checks.not_on_jax
@pytest.mark.parametrize("kind", [checks.glu_experts, checks.layer_experts])
def test_experts_of_other_kinds_equal_the_oracle(kind):
    check_multi_gate(MMoE(3, None, 2, experts=kind(3, 2), dtype="float64"), rows(4, 3))
    check_multi_gate(OMoE(3, None, 2, experts=kind(3, 2), dtype="float64"), rows(4, 3))


def test_omoe_gives_every_task_the_same():
    layer = OMoE(4, 3, ["a", "b"], gate_dropout=0.5)
    x = rows(2, 5, 6).astype("float32")
    outputs = layer(x, training=True)
    np.testing.assert_array_equal(array(outputs["a"]), array(outputs["b"]))
    gates = array(layer.gate_weights(x))
    assert gates.shape == (2, 5, 1, 4)
    np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-5)


@checks.not_on_jax
@pytest.mark.parametrize("top_k", [None, 2])
def test_one_task_makes_omoe_and_mmoe_the_same(top_k):
    x = rows(5, 3)
    single, multi = (
        kind(4, 2, 1, top_k=top_k, dtype="float64") for kind in (OMoE, MMoE)
    )
    single(x), multi(x)
    multi.set_weights(single.get_weights())
    np.testing.assert_array_equal(array(single(x)[0]), array(multi(x)[0]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_task_is_a_moe_with_a_dense_gate(temperature):
    x = rows(5, 3)
    experts = [MLPExperts(4, (6, 2), dtype="float64") for _ in range(2)]
    mmoe = MMoE(
        4, None, 1, experts=experts[0], gate_temperature=temperature, dtype="float64"
    )
    moe = MoE(4, experts=experts[1], router="dense", dtype="float64")
    moe.router.temperature = temperature
    mmoe(x), moe(x)
    checks.randomised(mmoe)
    experts[1].set_weights(experts[0].get_weights())
    moe.router.kernel.assign(array(mmoe.gates.kernels[0])[0])
    np.testing.assert_allclose(array(mmoe(x)[0]), array(moe(x)), **checks.OUTPUTS)


@checks.not_on_jax
def test_gates_as_wide_as_experts_start_different_from_one_seed():
    """Also if they read as much: a gate would weigh by what an expert computes."""
    initializer = keras.initializers.GlorotUniform(seed=1)
    for kind in (MMoE, OMoE):
        layer = kind(
            6,
            (6, 6),
            2,
            gate_units=(6,),
            kernel_initializer=initializer,
            gate_kernel_initializer=initializer,
        )
        layer.build((None, 6))
        assert len(checks.draws(layer)) == 12 + 2 * layer.num_gates
        checks.assert_all_different(checks.draws(layer))


@checks.not_on_jax
@pytest.mark.parametrize("top_k", [None, 2])
def test_gates_of_tasks_do_not_come_out_equal(top_k):
    gates = array(MMoE(6, 4, 3, top_k=top_k).gate_weights(rows(20, 5)))
    for k in range(3):
        assert not np.allclose(gates[:, k], gates[:, k - 1])
        assert gates[:, k].std(axis=0).max() > 0.01


@checks.not_on_jax
@pytest.mark.parametrize("tasks", [["like", "like_x"], ["like_x", "like"]])
def test_a_task_whose_name_begins_another_has_its_own_gate(tasks):
    layer = MMoE(3, 2, tasks, dtype="float64")
    x = rows(4, 3)
    before = layer(x)
    kernel = array(layer.gates.kernels[0]).copy()
    kernel[1] += rows(3, 3)
    layer.gates.kernels[0].assign(kernel)
    after = layer(x)
    np.testing.assert_array_equal(array(after[tasks[0]]), array(before[tasks[0]]))
    assert not np.allclose(array(after[tasks[1]]), array(before[tasks[1]]))


@checks.not_on_jax
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"gate_dropout": 0.5},
        {"dropout": 0.5, "top_k": 2, "dispatch": "split"},
        {"gate_dropout": 0.5, "top_k": 2},
    ],
)
def test_dropout_follows_its_seed(options):
    checks.assert_dropout_follows_its_seed(
        lambda seed: MMoE(4, (8, 3), 2, seed=seed, **options),
        rows(30, 4).astype("float32"),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: MMoE(2, 4, 2),
        lambda: PLE(2, 1, 1, 4, 2),
        lambda: AdaTT(2, 2, 4, 2),
        lambda: STEM(1, 1, 4, 2),
        lambda: HoME(1, 1, 4, 2),
        lambda: DSelectK(4, 4, 2, static=True),
    ],
    ids=["MMoE", "PLE", "AdaTT", "STEM", "HoME", "DSelectK"],
)
def test_gates_can_be_seen_before_the_first_call(make):
    layer = make()
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    before = keras.tree.flatten(layer.gate_weights(x))
    layer(x)
    after = keras.tree.flatten(layer.gate_weights(x))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
