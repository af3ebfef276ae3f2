"""MMoE, OMoE and SharedBottom against the NumPy oracle, and by hand."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import LayerExperts, MLPExperts
from keras_moe.layers import (
    PLE,
    STEM,
    AdaTT,
    DSelectK,
    HoME,
    MMoE,
    MoE,
    OMoE,
    SharedBottom,
    Tower,
)
from tests import backends, family, family_oracles, oracles, ways
from tests.family import array, arrays, rows

ORACLE = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)


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
    layer(*inputs)
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
        np.testing.assert_allclose(ops.convert_to_numpy(output), expected, **ORACLE)

    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum((o * c).sum() for o, c in zip(oracle(), cotangents, strict=True)),
        values + inputs,
    )
    for found, wanted in zip([*by_weight, *by_input], expected, strict=True):
        np.testing.assert_allclose(found, wanted, **GRADIENTS)


@family.not_on_jax
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
    layer(x)
    _, kernels, biases, gate_kernels = _weights(layer)
    expected = oracles.mmoe(x, kernels, biases, gate_kernels)
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(output), wanted, **ORACLE)


def test_by_hand():
    """Two experts 2x and -x + 1 of one unit; gates e^(±x) / (e^x + e^-x).

    At x = 0 both gates are 1/2: y = 1/2 * 0 + 1/2 * 1 = 0.5 for both tasks.
    At x = ln(3)/2 task "a" weighs expert 0 by sqrt3 / (sqrt3 + 1/sqrt3) = 3/4, task
    "b" by 1/4; the experts are ln 3 and 1 - ln(3)/2.
    """
    layer = MMoE(2, 1, ["a", "b"], activation="linear", dtype="float64")
    x = np.array([[0.0], [np.log(3) / 2]])
    layer(x)
    layer.experts.kernels[0].assign([[[2.0]], [[-1.0]]])
    layer.experts.biases[0].assign([[0.0], [1.0]])
    layer.gates.kernels[0].assign([[[1.0, -1.0]], [[-1.0, 1.0]]])
    first, second = np.log(3), 1 - np.log(3) / 2
    outputs = {k: ops.convert_to_numpy(v).ravel() for k, v in layer(x).items()}
    np.testing.assert_allclose(outputs["a"], [0.5, 0.75 * first + 0.25 * second])
    np.testing.assert_allclose(outputs["b"], [0.5, 0.25 * first + 0.75 * second])


def test_shared_bottom_is_one_mlp_for_all_tasks():
    layer = SharedBottom((6, 4), ["a", "b"], dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 3))
    outputs = layer(x)
    kernels = [ops.convert_to_numpy(k)[0] for k in layer.bottom.kernels]
    biases = [np.zeros(6), np.zeros(4)]
    expected = oracles.mlp(x, kernels, biases, oracles.relu, oracles.relu)
    for output in outputs.values():
        np.testing.assert_allclose(ops.convert_to_numpy(output), expected, **ORACLE)


def _gradient_check(layer, inputs, oracle):
    """All gradients of a built float64 layer against those of its oracle.

    `oracle` takes the values of the weights and gives the list of outputs.
    """
    rng = np.random.default_rng(5)
    # Biases too: at 0, a row of dead units would sit on the edge of the next ReLU.
    values = [rng.normal(size=w.shape) for w in layer.trainable_variables]
    for variable, value in zip(layer.trainable_variables, values, strict=True):
        variable.assign(value)
    cotangents = [rng.normal(size=o.shape) for o in oracle(values)]
    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    expected = oracles.numeric_gradients(
        lambda: sum(
            (o * c).sum() for o, c in zip(oracle(values), cotangents, strict=True)
        ),
        values + inputs,
    )
    for found, wanted in zip([*by_weight, *by_input], expected, strict=True):
        np.testing.assert_allclose(found, wanted, **GRADIENTS)


def test_gradients_of_the_other_layers_equal_the_oracle():
    x = np.random.default_rng(0).normal(size=(4, 3))

    def pairs(values):  # kernel, bias, kernel, bias, ...
        return values[::2], values[1::2]

    experts = MLPExperts(3, (4, 2), dtype="float64")
    experts(x)
    _gradient_check(experts, [x], lambda v: [oracles.mlp_experts(x, *pairs(v))])

    bottom = SharedBottom((4, 2), 2, dtype="float64")
    bottom(x)

    def shared(values):
        kernels, biases = pairs([v[0] for v in values])
        output = oracles.mlp(x, kernels, biases, oracles.relu, oracles.relu)
        return [output, output]

    _gradient_check(bottom, [x], shared)

    tower = Tower((4,), dtype="float64")
    tower(x)
    _gradient_check(
        tower, [x], lambda v: [oracles.mlp(x, *pairs(v), oracles.relu, oracles.linear)]
    )


def test_one_expert_equals_a_shared_bottom():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    mmoe, bottom = MMoE(1, (6, 4), 2), SharedBottom((6, 4), 2)
    expected, _ = mmoe(x), bottom(x)
    bottom.set_weights(mmoe.experts.get_weights())
    for a, b in zip(bottom(x), expected, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-5, atol=1e-6
        )


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
def test_few_large_matmuls_however_many_experts(num_experts):
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
    layer(x)
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
        np.testing.assert_allclose(sums, 1, **ORACLE)


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


def _built(layer, rows=3):
    x = np.random.default_rng(0).normal(size=(rows, 6)).astype("float32")
    layer(x)
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, r"`num_experts` must be an integer >= 1.*0"),
        ({"num_experts": 2.0}, r"`num_experts` must be an integer >= 1.*2\.0"),
        ({"expert_units": ()}, "`expert_units` must name at least one layer"),
        ({"expert_units": (4, -1)}, r"`expert_units\[1\]` must be .*-1"),
        ({"expert_units": "64"}, "`expert_units` must be an integer or a sequence"),
        ({"expert_units": None}, "`expert_units` must be given.*or `experts`"),
        ({"tasks": 0}, "`tasks` must be an integer >= 1"),
        ({"tasks": []}, "`tasks` must name at least one task"),
        ({"tasks": "click"}, "`tasks` must be a number of tasks or a sequence"),
        ({"tasks": ["a", "a"]}, "must be unique. Received 'a' more than once"),
        ({"tasks": ["a b"]}, "Received: 'a b'"),
        ({"tasks": ["a/b"]}, "Received: 'a/b'"),
        ({"tasks": ["_a"]}, "must start with a letter"),
        ({"top_k": 4}, "`top_k` must not exceed `num_experts`.*top_k=4.*=3"),
        ({"top_k": 0}, "`top_k` must be an integer >= 1"),
        ({"gate_units": (0,)}, r"`gate_units\[0\]`"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be a finite number > 0"),
        ({"gate_temperature": float("nan")}, "`gate_temperature`"),
        ({"gate_dropout": 1.0}, r"`gate_dropout` must be in \[0, 1\).*1\.0"),
        ({"gate_dropout": "0.1"}, "`gate_dropout` must be a number"),
        ({"dropout": -0.1}, "`dropout`"),
        ({"experts": 3, "expert_units": None}, "`experts` must be a Keras layer"),
        ({"experts": MLPExperts(3, 4)}, "`expert_units` must be None"),
        (
            {"experts": [MLPExperts(3, 4)], "expert_units": None},
            "`experts` must be a Keras layer",
        ),
        ({"dispatch": "fast"}, "`dispatch` must be one of.*'blocked'.*'fast'"),
        ({"dispatch": "capacity"}, "`dispatch` must be one of.*'capacity'"),
        ({"dispatch": "split"}, "`dispatch` must be .*top_k=None.*'split'"),
        (
            {
                "experts": LayerExperts([keras.layers.Dense(4) for _ in range(3)]),
                "expert_units": None,
                "top_k": 1,
                "dispatch": "blocked",
            },
            "`dispatch` must not be 'blocked'.*LayerExperts",
        ),
        (
            {"experts": MLPExperts(2, 4), "expert_units": None},
            "num_experts=3, experts.num_experts=2",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"num_experts": 3, "expert_units": 4, "tasks": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        MMoE(**{**good, **arguments})


def test_gate_inputs_of_another_batch_are_refused():
    layer = MMoE(3, 4, 2)
    with pytest.raises(ValueError, match=r"`gate_inputs`.*\(5, 6\).*\(4, 2\)"):
        layer(np.ones((5, 6)), np.ones((4, 2)))


@keras.saving.register_keras_serializable("tests")
class _PlainExperts(keras.layers.Layer):
    """What a user writes: sublayers and a `call`, nothing more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [keras.layers.Dense(4), keras.layers.Dense(4)]

    def call(self, inputs):
        return ops.stack([part(inputs) for part in self.parts], axis=-2)


def test_experts_may_be_any_layer():
    layer = MMoE(2, None, ["a", "b"], experts=_PlainExperts())
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    assert layer.compute_output_shape(x.shape) == {"a": (3, 4), "b": (3, 4)}
    outputs = layer(x)
    weights = ops.convert_to_numpy(layer.gate_weights(x))
    first, second = (ops.convert_to_numpy(p(x)) for p in layer.experts.parts)
    expected = weights[:, 0, :1] * first + weights[:, 0, 1:] * second
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs["a"]), expected, rtol=1e-4, atol=1e-6
    )
    symbolic = layer(keras.Input((6,)))
    assert symbolic["b"].shape == (None, 4)


def test_experts_of_another_shape_are_refused():
    layer = MMoE(2, None, 2, experts=keras.layers.Dense(4))
    with pytest.raises(ValueError, match=r"`experts` must map .* instead of"):
        layer(np.ones((5, 6)))


@pytest.mark.parametrize("shape", [(4,), (None, None)])
def test_inputs_without_a_feature_axis_are_refused(shape):
    with pytest.raises(ValueError, match="Received an input of shape"):
        MMoE(3, 4, 2).build(shape)


# Experts of any kind, more tasks and options, and one gate for all


def _check(layer, x, **given):
    """Outputs and all gradients of a layer for x (..., d) are those of the oracle."""
    layer(x)
    values = family.randomised(layer)
    experts = family.experts_of(layer.experts, values)
    gates = family.mlps(layer.gates, values)
    flat = x.reshape(-1, x.shape[-1])
    options = {"temperature": layer.gate_temperature, "top_k": layer.top_k}

    def expected():
        if isinstance(layer, OMoE):
            tasks = len(layer.tasks)
            outputs = family_oracles.omoe(flat, experts, gates[0], tasks, **options)
        else:
            outputs = family_oracles.mmoe(flat, experts, gates, **options)
        return [output.reshape(*x.shape[:-1], -1) for output in outputs]

    family.check(layer, [x], expected, values, **given)


@pytest.mark.parametrize(
    ("kind", "tasks", "leading", "options"),
    family.few_on_jax(
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
    _check(kind(4, (3, 2), tasks, dtype="float64", **options), rows(*leading, 3))


@family.not_on_jax
@pytest.mark.parametrize("kind", [family.glu_experts, family.layer_experts])
def test_experts_of_other_kinds_equal_the_oracle(kind):
    _check(MMoE(3, None, 2, experts=kind(3, 2), dtype="float64"), rows(4, 3))
    _check(OMoE(3, None, 2, experts=kind(3, 2), dtype="float64"), rows(4, 3))


def test_omoe_gives_every_task_the_same():
    layer = OMoE(4, 3, ["a", "b"], gate_dropout=0.5)
    x = rows(2, 5, 6).astype("float32")
    outputs = layer(x, training=True)
    np.testing.assert_array_equal(array(outputs["a"]), array(outputs["b"]))
    gates = array(layer.gate_weights(x))
    assert gates.shape == (2, 5, 1, 4)
    np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-5)


@family.not_on_jax
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
    family.randomised(mmoe)
    experts[1].set_weights(experts[0].get_weights())
    moe.router.kernel.assign(array(mmoe.gates.kernels[0])[0])
    np.testing.assert_allclose(array(mmoe(x)[0]), array(moe(x)), **family.OUTPUTS)


@family.not_on_jax
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
        assert len(family.draws(layer)) == 12 + 2 * layer.num_gates
        family.assert_all_different(family.draws(layer))


@family.not_on_jax
@pytest.mark.parametrize("top_k", [None, 2])
def test_gates_of_tasks_do_not_come_out_equal(top_k):
    gates = array(MMoE(6, 4, 3, top_k=top_k).gate_weights(rows(20, 5)))
    for k in range(3):
        assert not np.allclose(gates[:, k], gates[:, k - 1])
        assert gates[:, k].std(axis=0).max() > 0.01


@family.not_on_jax
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


@family.not_on_jax
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
    family.assert_dropout_follows_its_seed(
        lambda seed: MMoE(4, (8, 3), 2, seed=seed, **options),
        rows(30, 4).astype("float32"),
    )


# Sparse: only the experts that some gate chose

E = 6
SPARSE = [way for way in ways.TOKEN_CHOICE if way != "capacity"]
only_tensorflow = pytest.mark.skipif(
    ways.BACKEND != "tensorflow", reason="TensorFlow has eager, graph and XLA"
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
    family.few_on_jax(
        [
            (None, 1, (5,), {"top_k": 1}),
            (None, 2, (5,), {"gate_use_bias": True}),
            (None, 3, (2, 3), {"gate_temperature": 0.5}),
            (None, 2, (4,), {"top_k": E}),
            (family.glu_experts, 2, (5,), {}),
            (family.layer_experts, 2, (5,), {}),
        ],
        1,
    ),
)
def test_every_way_and_all_its_gradients_equal_the_oracle(
    experts, tasks, leading, options, way
):
    if experts is family.layer_experts and way not in ways.UNSTACKED:
        pytest.skip("no kernels to multiply together")
    layer = _sparse(
        tasks=tasks,
        experts=experts and experts(E, 2),
        dispatch=ways.dispatch_of(way),
        **options,
    )
    with ways.chosen(way):
        _check(layer, rows(*leading, 3))


@family.not_on_jax
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
    layer(x)
    values = family.randomised(layer)
    expected = family_oracles.mmoe(
        x,
        family.experts_of(layer.experts, values),
        family.mlps(layer.gates, values),
        top_k=layer.top_k,
    )
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(array(output), wanted, **family.OUTPUTS)


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
    family.randomised(layer)
    layer.gates.kernels[0].assign(kernel)
    return layer, x


def _outputs_and_gradients(layer, x):
    shape = (len(x), 2)
    cotangents = [rows(*shape), rows(*shape, seed=1)]
    found = backends.outputs_and_gradients(layer, [x], cotangents)
    return [part for group in found for part in group]


@pytest.mark.parametrize("way", [way for way in SPARSE if way != "dense"])
@pytest.mark.parametrize("name", ROUTINGS if ways.BACKEND != "jax" else ["no row"])
def test_any_routing_gives_what_the_dense_one_gives(name, way):
    layer, x = _routed(name, dispatch="dense")
    wanted = _outputs_and_gradients(layer, x)
    layer.dispatch = ways.dispatch_of(way)
    with ways.chosen(way):
        found = _outputs_and_gradients(layer, x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **backends.tolerance(1e-9, 1e-11))


@pytest.mark.parametrize("way", SPARSE)
@pytest.mark.parametrize(
    "name",
    ["all tasks choose alike", pytest.param("random", marks=family.not_on_jax)],
)
def test_a_row_that_is_not_finite_changes_no_other_row(name, way):
    """Also where fewer experts are chosen than there is room for."""
    layer, x = _routed(name, dispatch=ways.dispatch_of(way))
    others, broken = np.delete(np.arange(2 * E), [3, 8]), x.copy()
    broken[3], broken[8, 0] = np.nan, np.inf
    with ways.chosen(way):
        pairs = zip(arrays(layer(x)), arrays(layer(broken)), strict=True)
    for wanted, found in pairs:
        np.testing.assert_allclose(found[others], wanted[others], **family.OUTPUTS)
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
        ("split", False, family.layer_experts),
        ("in_turn", False, None),
        ("in_turn", True, None),
        ("at_once", True, None),
    ],
)
def test_graph_and_xla_give_what_the_dense_one_gives(way, jit, experts):
    """One graph of an unknown number of rows serves every routing."""
    import tensorflow as tf

    layer, _ = _routed("random", experts and experts(E, 2))
    signature = [tf.TensorSpec([None, E], "float64")]
    call, dense = (_compiled(layer, *how) for how in ((jit, signature), (False, None)))
    for kernel, x in ROUTINGS.values():
        if way == "at_once" and len(x) < 2 * E:
            continue  # XLA compiles each number of rows, for seconds.
        layer.gates.kernels[0].assign(kernel)
        layer.dispatch = "dense"
        wanted = dense(tf.constant(x))
        layer.dispatch = ways.dispatch_of(way)
        with ways.chosen(way):
            found = call(tf.constant(x))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(ways.BACKEND == "jax", reason="split is not for XLA")
@pytest.mark.parametrize("name", ROUTINGS)
def test_layers_of_any_kind_give_what_the_dense_one_gives(name):
    layer, x = _routed(name, family.layer_experts(E, 2), dispatch="dense")
    wanted = _outputs_and_gradients(layer, x)
    layer.dispatch = "split"
    for a, b in zip(_outputs_and_gradients(layer, x), wanted, strict=True):
        np.testing.assert_allclose(a, b, **backends.tolerance(1e-9, 1e-11))


@only_tensorflow
def test_what_xla_compiled_once_serves_every_routing():
    """As shipped, with the dispatch and the blocks that it chooses itself.

    That XLA compiles once for a shape is counted in `test_moe.py`.

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


@pytest.mark.skipif(ways.BACKEND == "jax", reason="split is not for XLA")
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


@pytest.mark.skipif(ways.BACKEND == "jax", reason="split is not for XLA")
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


@family.not_on_jax
def test_gate_inputs_choose_the_experts_of_a_sparse_one():
    x, gate_x = rows(6, 3), rows(6, 4, seed=1)
    layer = _sparse(top_k=1)
    layer(x, gate_x)
    values = family.randomised(layer)
    experts = family.experts_of(layer.experts, values)
    gates = family.mlps(layer.gates, values)
    expected = family_oracles.mmoe(x, experts, gates, gate_x, top_k=1)
    for output, wanted in zip(layer(x, gate_x), expected, strict=True):
        np.testing.assert_allclose(array(output), wanted, **family.OUTPUTS)
    for other in (rows(5, 4), rows(6, 1, 4)):
        with pytest.raises(ValueError, match=r"`gate_inputs`.*\(6, 3\)"):
            layer(x, other)


@pytest.mark.parametrize("way", SPARSE)
def test_all_experts_chosen_is_the_dense_mmoe(way):
    x = rows(5, 3)
    dense = MMoE(4, (3, 2), 2, dtype="float64")
    sparse = MMoE(
        4, (3, 2), 2, top_k=4, dispatch=ways.dispatch_of(way), dtype="float64"
    )
    dense(x)
    with ways.chosen(way):
        sparse(x)
        sparse.set_weights(dense.get_weights())
        found = sparse(x)
    for a, b in zip(found, dense(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **family.OUTPUTS)


@only_tensorflow
@pytest.mark.parametrize("experts", [None, family.layer_experts])
def test_an_export_serves_any_batch_size(experts, tmp_path):
    import tensorflow as tf

    inputs = keras.Input((E,), dtype="float64")
    layer = _sparse(1, ["a", "b"], experts and experts(12, 2), num_experts=12)
    model = keras.Model(inputs, layer(inputs))
    family.randomised(layer)
    model.export(tmp_path, verbose=False)
    serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    layer.dispatch = "dense"
    x = rows(300, E)
    for n in (0, 1, 7, 300):
        found, wanted = serve(tf.constant(x[:n])), layer(x[:n])
        assert set(found) == {"a", "b"}
        for name, output in found.items():
            np.testing.assert_allclose(output, array(wanted[name]), **family.OUTPUTS)


def test_split_under_a_compiler_says_what_to_do():
    layer = MMoE(6, 2, 2, top_k=1, dispatch="split")
    calls = backends.compiled_calls(layer)
    if not calls:
        pytest.skip("this backend is not compiled here")
    layer.build((None, 3))
    compiler = calls.get("xla") or calls["jit"]
    with pytest.raises(ValueError, match=r'dispatch="split".*jit_compile.*"auto"'):
        compiler(ops.convert_to_tensor(rows(3, 3).astype("float32")))


def test_ragged_is_refused_where_it_would_compute_every_expert():
    with pytest.raises(ValueError, match=r"ragged"):
        MMoE(6, 2, 2, top_k=1, dispatch="ragged")(rows(3, 3).astype("float32"))


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="an unknown batch is TensorFlow's"
)
@pytest.mark.parametrize("dispatch", ["dense", "split"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_gate_inputs_of_another_batch_fail_where_only_the_run_knows(dispatch, rows):
    import tensorflow as tf

    layer = MMoE(4, 4, 2, top_k=1, dispatch=dispatch)
    x = np.ones((4, 6), "float32")
    signature = [tf.TensorSpec((None, 6)), tf.TensorSpec((None, 2))]
    call = tf.function(lambda a, b: layer(a, gate_inputs=b), input_signature=signature)
    assert call(x, np.ones((4, 2), "float32"))[0].shape == (4, 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`gate_inputs` must have"):
        call(x, np.ones((rows, 2), "float32"))


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


def test_tasks_without_an_order_are_refused():
    with pytest.raises(ValueError, match="sequence of task names, in order"):
        MMoE(2, 4, {"click", "buy"})
    with pytest.raises(ValueError, match="sequence of task names, in order"):
        MMoE(2, 4, {"click": 1, "buy": 2})
    assert len(MMoE(2, 4, np.int64(2))(np.ones((1, 3)))) == 2
