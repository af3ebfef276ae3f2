"""PLE and CGC against the NumPy oracle, by hand, and in their special cases."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import LayerExperts, MLPExperts
from keras_moe.layers import CGC, PLE, MMoE
from tests.support import checks, multitask_oracles
from tests.support.checks import array, arrays, rows

D, U = 2, 2
EXPERTS = {"GLU": checks.glu_experts, "layers": checks.layer_experts}


def check(layer, *leading):
    """Outputs and all gradients of a layer are those of the oracle."""
    x = rows(*leading, D)
    layer.build(x.shape)
    values = checks.randomised(layer)
    flat = x.reshape(-1, D)
    levels = checks.levels_of(layer, values)

    def expected():
        outputs = multitask_oracles.ple(
            flat,
            levels,
            len(layer.tasks),
            layer.num_task_experts,
            layer.gate_temperature,
        )
        return [output.reshape(*leading, -1) for output in outputs]

    checks.check(layer, [x], expected, values)


@pytest.mark.parametrize(
    ("levels", "shared", "own", "tasks", "options"),
    checks.few_on_jax(
        [
            (1, 1, 1, 1, {}),
            (1, 0, 2, 2, {}),
            (1, 2, 0, 3, {}),
            (1, 0, 1, 2, {}),
            (2, 1, 1, 2, {"units": (3, U)}),
            (2, 1, 0, 2, {}),
            (2, 3, 0, 2, {}),  # MMoE in several levels
            (3, 2, 0, 3, {"gate_units": (3,)}),
            (2, 2, 1, 1, {}),
            (2, 1, 2, 3, {"gate_temperature": 0.5}),
            (2, 1, 1, 2, {"gate_units": (3,), "gate_use_bias": True}),
            (3, 2, 2, 2, {}),
            (3, 1, 1, 3, {"units": (3, 3, U)}),
        ],
        6,
        10,
    ),
)
def test_outputs_and_all_gradients_equal_the_oracle(
    levels, shared, own, tasks, options
):
    options = dict(options)
    units = options.pop("units", U)
    check(PLE(levels, shared, own, units, tasks, dtype="float64", **options), 3)


@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 2)])
def test_further_axes_are_rows(leading):
    check(PLE(2, 1, 1, U, 2, dtype="float64"), *leading)


@checks.not_on_jax
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_of_other_kinds_equal_the_oracle(kind):
    experts = [EXPERTS[kind](5, 3), EXPERTS[kind](5, U)]
    check(PLE(2, 1, 2, None, 2, experts=experts, dtype="float64"), 3)


def test_kinds_may_change_from_level_to_level():
    experts = [checks.layer_experts(3, 3), checks.glu_experts(3, U)]
    layer = PLE(2, 1, 1, None, 2, experts=experts, dtype="float64")
    assert layer.compute_output_shape((None, D)) == [(None, U)] * 2
    check(layer, 3)


@checks.not_on_jax
def test_cgc_equals_the_oracle():
    check(CGC(2, 1, (3, U), 2, dtype="float64"), 3)
    check(CGC(1, 1, None, 2, experts=checks.glu_experts(3, U), dtype="float64"), 3)


@checks.not_on_jax
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 4),
    d=st.integers(1, 3),
    levels=st.integers(1, 3),
    shared=st.integers(1, 3),
    own=st.integers(0, 3),
    tasks=st.integers(1, 3),
    units=st.lists(st.integers(1, 3), min_size=1, max_size=2),
)
def test_any_sizes_equal_the_oracle(n, d, levels, shared, own, tasks, units):
    layer = PLE(levels, shared, own, units, tasks, dtype="float64")
    x = rows(n, d)
    layer.build(x.shape)
    values = checks.randomised(layer)
    expected = multitask_oracles.ple(x, checks.levels_of(layer, values), tasks, own)
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(array(output), wanted, **checks.OUTPUTS)


def test_by_hand():
    """One expert a task, 2x and -x, and a shared one, x + 1; two levels of them.

    All gates are 0, so that each weighs what it sees evenly. At x = 1 the experts give
    2, -1 and 2. Task "a" sees 2 and 2: 2. Task "b" sees -1 and 2: 0.5. The shared
    stream is (2 - 1 + 2) / 3 = 1. Above, the experts give 4, -0.5 and 2, so that "a"
    is 3 and "b" is 0.75.
    """
    layer = PLE(
        2,
        1,
        1,
        1,
        ["a", "b"],
        activation="linear",
        gate_kernel_initializer="zeros",
        dtype="float64",
    )
    x = np.ones((1, 1))
    layer.build(x.shape)
    for experts in layer.experts:
        experts.kernels[0].assign([[[2.0]], [[-1.0]], [[1.0]]])
        experts.biases[0].assign([[0.0], [0.0], [1.0]])
    outputs = layer(x)
    np.testing.assert_allclose(array(outputs["a"]), [[3.0]])
    np.testing.assert_allclose(array(outputs["b"]), [[0.75]])


# Special cases


@checks.not_on_jax
@pytest.mark.parametrize("options", [{}, {"gate_units": (4,), "gate_use_bias": True}])
def test_one_level_without_task_experts_is_an_mmoe(options):
    x = rows(5, 3)
    ple = PLE(1, 4, 0, (5, 2), 3, dtype="float64", **options)
    mmoe = MMoE(4, (5, 2), 3, dtype="float64", **options)
    ple(x), mmoe(x)
    checks.randomised(ple)
    mmoe.experts.set_weights(ple.experts[0].get_weights())
    mmoe.gates.set_weights(ple.gates[0].get_weights())
    for a, b in zip(ple(x), mmoe(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


def test_cgc_is_one_level_of_ple():
    x = rows(5, 3)
    cgc, ple = CGC(2, 1, (5, 2), 2), PLE(1, 2, 1, (5, 2), 2)
    cgc(x), ple(x)
    ple.set_weights(cgc.get_weights())
    for a, b in zip(arrays(cgc(x)), arrays(ple(x)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "num_levels" not in cgc.get_config()


@checks.not_on_jax
def test_without_shared_experts_tasks_know_nothing_of_each_other():
    layer = CGC(0, 2, 3, 2, dtype="float64")
    x = rows(4, 3)
    before = arrays(layer(x))
    for weight in (*layer.experts[0].weights, *layer.gates[0].weights):
        value = array(weight).copy()
        value[len(value) // 2 :] += 1.0  # What belongs to the second task.
        weight.assign(value)
    after = arrays(layer(x))
    np.testing.assert_array_equal(after[0], before[0])
    assert not np.allclose(after[1], before[1])


# Faults seen elsewhere


@checks.not_on_jax
@pytest.mark.parametrize("tasks", [["like", "like_x"], ["like_x", "like"]])
def test_a_task_whose_name_begins_another_has_its_own_experts(tasks):
    """Outputs by name are those by number, and no task reads another one's experts."""
    x = rows(4, 3)
    named, counted = (PLE(2, 1, 2, (4, 2), t, dtype="float64") for t in (tasks, 2))
    named(x), counted(x)
    counted.set_weights(named.get_weights())
    for name, output in zip(tasks, counted(x), strict=True):
        np.testing.assert_array_equal(array(named(x)[name]), array(output))
    before = named(x)
    kernel = named.experts[1].kernels[0]
    value = array(kernel).copy()
    value[2:4] += 1.0  # Experts 2 and 3, those of the second task.
    kernel.assign(value)
    after = named(x)
    np.testing.assert_array_equal(array(after[tasks[0]]), array(before[tasks[0]]))
    assert not np.allclose(array(after[tasks[1]]), array(before[tasks[1]]))


@checks.not_on_jax
def test_experts_and_gates_start_different_from_one_seed():
    """Also across levels and between gates and experts of one shape."""
    initializer = keras.initializers.GlorotUniform(seed=1)
    layer = PLE(
        3,
        2,
        2,
        (4, 4),
        2,
        kernel_initializer=initializer,
        gate_kernel_initializer=initializer,
    )
    layer.build((None, 4))
    # 3 levels of 6 experts of 2 layers, 3 of 2 gates, and 2 shared gates.
    assert len(checks.draws(layer)) == 36 + 6 + 2
    checks.assert_all_different(checks.draws(layer))
    for gates in layer.gate_weights(rows(5, 4).astype("float32")):
        gates = array(gates)
        assert not np.allclose(gates[:, 0], gates[:, 1])
        assert gates.std() > 0.01


@checks.not_on_jax
def test_gates_of_a_second_level_read_the_first_one():
    """They are as wide as its experts, and blind to inputs that those do not see."""
    layer = PLE(2, 1, 1, 3, 2, dtype="float64")
    x = rows(4, 5)
    layer(x)
    assert layer.gates[1].kernels[0].shape == (2, 3, 2)
    for first in (layer.experts[0], layer.gates[0], layer.shared_gates[0]):
        kernel = array(first.kernels[0]).copy()
        kernel[:, 0] = 0.0
        first.kernels[0].assign(kernel)
    before, outputs = array(layer.gate_weights(x)[1]), arrays(layer(x))
    x[:, 0] += 7.0
    np.testing.assert_array_equal(array(layer.gate_weights(x)[1]), before)
    for a, b in zip(arrays(layer(x)), outputs, strict=True):
        np.testing.assert_array_equal(a, b)


# Gates


@pytest.mark.parametrize(("shared", "own"), [(2, 1), (2, 0), (0, 3)])
def test_gate_weights_sum_to_one(shared, own):
    levels = 2 if shared else 1
    layer = PLE(levels, shared, own, 3, 2, gate_dropout=0.5)
    x = rows(4, 2, 5).astype("float32")
    layer(x)
    found = layer.gate_weights(x)
    assert len(found) == levels
    for gates in found:
        assert gates.shape == (4, 2, 2, own + shared)
        np.testing.assert_allclose(array(gates).sum(-1), 1.0, rtol=1e-5)


def test_gate_weights_weigh_own_experts_first_then_shared_ones():
    layer = PLE(1, 1, 2, 3, 2, dtype="float64")
    x = rows(4, 5)
    outputs = layer(x)
    (gates,), experts = arrays(layer.gate_weights(x)), array(layer.experts[0](x))
    for k, seen in enumerate([[0, 1, 4], [2, 3, 4]]):
        expected = (gates[:, k, :, None] * experts[:, seen]).sum(1)
        np.testing.assert_allclose(array(outputs[k]), expected, **checks.OUTPUTS)


@checks.not_on_jax
def test_gate_dropout_renormalises():
    """With linear experts that all give 1, any gates that sum to 1 give 1."""
    layer = PLE(2, 2, 2, 1, 2, activation="linear", gate_dropout=0.6, seed=0)
    x = rows(40, 3).astype("float32")
    layer(x)
    assert (
        len(np.unique(array(layer.gate_probabilities(layer.gates[0](x), True)) > 0))
        == 2
    )
    for experts in layer.experts:
        experts.kernels[0].assign(np.zeros(experts.kernels[0].shape))
        experts.biases[0].assign(np.ones(experts.biases[0].shape))
    for output in layer(x, training=True):
        np.testing.assert_allclose(array(output), 1.0, rtol=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"gate_dropout": 0.5}])
def test_dropout_follows_its_seed(options):
    checks.assert_dropout_follows_its_seed(
        lambda seed: PLE(2, 2, 1, (8, 3), 2, seed=seed, **options),
        rows(30, 4).astype("float32"),
    )


@checks.not_on_jax
@pytest.mark.parametrize("levels", [1, 2])
def test_layers_in_experts_are_told_of_training(levels):
    """Of all levels: above the first, experts are not called as a layer."""

    def experts():
        return LayerExperts([keras.layers.Dropout(0.5) for _ in range(3)])

    layer = PLE(levels, 1, 1, None, 2, experts=[experts() for _ in range(levels)])
    x = np.ones((20, 4), "float32")
    np.testing.assert_allclose(array(layer(x)[0]), 1.0, rtol=1e-6)
    trained = array(layer(x, training=True)[0])
    assert len(np.unique(trained.round(3))) > 2**levels


@checks.not_on_jax
def test_gates_of_one_expert_train_without_a_warning():
    """They are 1, and their weights have gradients: 0, but not none."""
    inputs = keras.Input((4,))
    layer = CGC(0, 1, 3, 2, gate_dropout=0.5)
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    x = rows(8, 4).astype("float32")
    model.fit(x, [x[:, :3], x[:, 1:]], verbose=0)
    assert (array(layer.gate_weights(x)[0]) == 1.0).all()


def test_a_row_of_nan_stays_in_its_row():
    layer = PLE(2, 1, 1, 3, 2)
    x = rows(3, 4).astype("float32")
    expected = arrays(layer(x))
    x[1] = np.nan
    for found, wanted in zip(arrays(layer(x)), expected, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graph"
)
@pytest.mark.parametrize("tasks", [2, 5])
def test_few_large_matmuls_however_many_tasks(tasks):
    """Two levels of experts, gates and mixtures, and a shared gate: seven, forward."""
    import tensorflow as tf

    layer = PLE(2, 1, 1, 4, tasks)
    layer.build((None, 6))
    traced = tf.function(layer).get_concrete_function(tf.TensorSpec((None, 6)))
    kinds = [op.type for op in traced.graph.get_operations()]
    assert sum("MatMul" in kind for kind in kinds) == 7


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_levels": 0}, r"`num_levels` must be an integer >= 1.*0"),
        ({"num_levels": 1.0}, r"`num_levels` must be an integer >= 1.*1\.0"),
        ({"num_shared_experts": -1}, r"`num_shared_experts` must be .*>= 0.*-1"),
        ({"num_task_experts": -2}, r"`num_task_experts` must be .*>= 0.*-2"),
        (
            {"num_shared_experts": 0, "num_task_experts": 0},
            "`num_shared_experts` and `num_task_experts` must not both be 0",
        ),
        (
            {"num_shared_experts": 0},
            "`num_shared_experts` must be >= 1 .*num_levels=2, num_shared_experts=0",
        ),
        ({"expert_units": (4, 0)}, r"`expert_units\[1\]` must be .*0"),
        ({"expert_units": None}, "`expert_units` must be given.*or `experts`"),
        ({"tasks": 0}, "`tasks` must be an integer >= 1"),
        ({"tasks": ["a", "b", "a"]}, "must be unique. Received 'a' more than once"),
        ({"tasks": ["a", "b c"]}, "Received: 'b c'"),
        ({"tasks": ["1a"]}, "must start with a letter"),
        ({"gate_temperature": -1}, "`gate_temperature` must be a finite number > 0"),
        ({"gate_dropout": 1}, r"`gate_dropout` must be in \[0, 1\).*1"),
        ({"gate_units": (2, 0)}, r"`gate_units\[1\]`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {
        "num_levels": 2,
        "num_shared_experts": 1,
        "num_task_experts": 1,
        "expert_units": 4,
        "tasks": ["a", "b"],
    }
    with pytest.raises(ValueError, match=message):
        PLE(**{**good, **arguments})


_SAME = MLPExperts(3, 4)


@keras.saving.register_keras_serializable("tests")
class _NoSlots(keras.layers.Layer):
    """Experts that can be called, but not each on a stream of its own."""

    num_experts = 3

    def call(self, inputs):
        return ops.stack([inputs] * 3, axis=-2)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (MLPExperts(3, 4), "`experts` must hold a separate.*each level.*num_levels=2"),
        ([MLPExperts(3, 4)], "`experts` must hold a sep.*each level.*num_levels=2"),
        ([MLPExperts(3, 4) for _ in range(3)], "`experts` must hold a sep.*level"),
        ([_SAME, _SAME], "`experts` must hold a separate layer for each level"),
        ([MLPExperts(3, 4), MLPExperts(2, 4)], r"`experts\[1\]` must hold 3.*=2"),
        ([_NoSlots(), _NoSlots()], r"`experts\[0\]` must be a layer of keras_moe"),
        ([keras.layers.Dense(4), "mlp"], r"`experts\[0\]` must be a layer of"),
    ],
)
def test_bad_experts_are_named(experts, message):
    with pytest.raises(ValueError, match=message):
        PLE(2, 1, 1, None, 2, experts=experts)


def test_units_beside_experts_are_refused():
    with pytest.raises(ValueError, match=r"`expert_units` must be None.*4"):
        CGC(1, 1, 4, 2, experts=MLPExperts(3, 4))


def test_experts_of_different_widths_are_refused():
    experts = LayerExperts([keras.layers.Dense(units) for units in (4, 4, 5)])
    layer = CGC(1, 1, None, 2, experts=experts)
    with pytest.raises(ValueError, match=r"`layers` must map.*\(None, 5\)"):
        layer(np.ones((2, 3)))


@pytest.mark.parametrize("shape", [(4,), (None, None)])
def test_inputs_without_a_feature_axis_are_refused(shape):
    with pytest.raises(ValueError, match="Received an input of shape"):
        CGC(1, 1, 4, 2).build(shape)
