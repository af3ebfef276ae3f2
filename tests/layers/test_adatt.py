"""AdaTT against the NumPy oracle, by hand, and in its special cases."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe.experts import LayerExperts, MLPExperts
from keras_moe.layers import AdaTT, MMoE
from tests.support import checks, multitask_oracles
from tests.support.checks import array, arrays, rows

D, U = 2, 2


def levels_of(layer, values):
    """Experts, gates and the two kinds of own weights of each level."""
    found = []
    for level, experts in enumerate(layer.experts):
        own = [
            values[id(weights[level])] if level < len(weights) else None
            for weights in (layer.own_weights, layer.shared_own_weights)
        ]
        gates = checks.mlps(layer.gates[level], values)
        found.append((checks.experts_of(experts, values), gates, *own))
    return found


def oracle(layer, x, levels):
    return multitask_oracles.adatt(
        x,
        levels,
        len(layer.tasks),
        layer.num_task_experts,
        layer.residual,
        layer.gate_temperature,
    )


def check(layer, *leading):
    """Outputs and all gradients of a layer are those of the oracle."""
    x = rows(*leading, D)
    layer.build(x.shape)
    values = checks.randomised(layer)
    levels, flat = levels_of(layer, values), x.reshape(-1, D)

    def expected():
        return [o.reshape(*leading, -1) for o in oracle(layer, flat, levels)]

    checks.check(layer, [x], expected, values)


@pytest.mark.parametrize(
    ("levels", "own", "tasks", "shared", "options"),
    checks.few_on_jax(
        [
            (1, 1, 1, 0, {}),
            (1, 2, 2, 0, {}),
            (1, 1, 3, 2, {}),
            (1, 2, 2, 1, {"residual": False}),
            (2, 1, 2, 0, {"units": (3, U)}),
            (2, 2, 1, 1, {}),
            (2, 1, 3, 2, {"gate_temperature": 0.5}),
            (2, 2, 2, 2, {"gate_units": (3,), "gate_use_bias": True}),
            (2, 1, 2, 2, {"residual": False}),
            (3, 2, 2, 2, {}),
            (3, 1, 3, 1, {"units": (3, 3, U)}),
        ],
        5,
        6,
    ),
)
def test_outputs_and_all_gradients_equal_the_oracle(
    levels, own, tasks, shared, options
):
    options = dict(options)
    units = options.pop("units", U)
    check(
        AdaTT(
            levels,
            own,
            units,
            tasks,
            num_shared_experts=shared,
            dtype="float64",
            **options,
        ),
        3,
    )


def test_further_axes_are_rows():
    layer = AdaTT(2, 2, U, 2, num_shared_experts=2, dtype="float64")
    check(layer, 2, 3)


def test_kinds_of_experts_may_change_from_level_to_level():
    experts = [checks.layer_experts(5, 3), checks.glu_experts(5, U)]
    layer = AdaTT(2, 2, None, 2, num_shared_experts=1, experts=experts, dtype="float64")
    assert layer.compute_output_shape((None, D)) == [(None, U)] * 2
    check(layer, 3)


@checks.not_on_jax
@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 4),
    d=st.integers(1, 3),
    levels=st.integers(1, 3),
    own=st.integers(1, 3),
    tasks=st.integers(1, 3),
    shared=st.integers(0, 3),
)
def test_any_sizes_equal_the_oracle(n, d, levels, own, tasks, shared):
    layer = AdaTT(levels, own, U, tasks, num_shared_experts=shared, dtype="float64")
    x = rows(n, d)
    layer.build(x.shape)
    values = checks.randomised(layer)
    expected = oracle(layer, x, levels_of(layer, values))
    for output, wanted in zip(layer(x), expected, strict=True):
        np.testing.assert_allclose(array(output), wanted, **checks.OUTPUTS)


def test_by_hand():
    """One expert a task, 2x and -x, and even gates; two levels of them.

    At x = 1 the experts give 2 and -1, of which every gate makes 0.5. With the residual
    the streams are 2.5 and -0.5. Above, the experts give 5 and 0.5, on average 2.75, so
    that the tasks are 7.75 and 3.25.
    """
    layer = AdaTT(
        2,
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
        experts.kernels[0].assign([[[2.0]], [[-1.0]]])
    outputs = layer(x)
    np.testing.assert_allclose(array(outputs["a"]), [[7.75]])
    np.testing.assert_allclose(array(outputs["b"]), [[3.25]])


# Special cases


@checks.not_on_jax
@pytest.mark.parametrize("shared", [0, 2])
def test_one_level_without_a_residual_is_an_mmoe(shared):
    x = rows(5, 3)
    layer = AdaTT(
        1, 2, (4, 2), 2, num_shared_experts=shared, residual=False, dtype="float64"
    )
    mmoe = MMoE(4 + shared, (4, 2), 2, dtype="float64")
    layer(x), mmoe(x)
    mmoe.set_weights(layer.get_weights())
    for a, b in zip(layer(x), mmoe(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


@checks.not_on_jax
def test_own_weights_of_one_do_what_single_experts_do():
    """With v = 1 and equal experts, two of half the size are as good as one."""
    x = rows(5, 3)
    single, double = (
        AdaTT(1, m, 2, 2, gate_kernel_initializer="zeros", dtype="float64")
        for m in (1, 2)
    )
    single(x), double(x)
    double.own_weights[0].assign(np.full((2, 2), 0.5))
    for many, one in zip(
        double.experts[0].weights, single.experts[0].weights, strict=True
    ):
        many.assign(np.repeat(array(one), 2, axis=0))
    for a, b in zip(double(x), single(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


# Faults seen elsewhere


@checks.not_on_jax
def test_a_task_whose_name_begins_another_has_its_own_experts():
    """With even gates, only the residual tells the tasks apart."""
    tasks = ["like_x", "like"]
    layer = AdaTT(1, 2, 3, tasks, gate_kernel_initializer="zeros", dtype="float64")
    x = rows(4, 3)
    before, experts = layer(x), array(layer.experts[0](x))
    (own,) = layer.own_weights
    for k, name in enumerate(tasks):
        residual = (array(own)[k][:, None] * experts[:, 2 * k : 2 * k + 2]).sum(1)
        np.testing.assert_allclose(
            array(before[name]), experts.mean(1) + residual, **checks.OUTPUTS
        )


@checks.not_on_jax
def test_experts_gates_and_own_weights_start_different_from_one_seed():
    initializer = keras.initializers.GlorotUniform(seed=1)
    layer = AdaTT(
        3,
        2,
        (6, 6),
        2,
        num_shared_experts=2,
        kernel_initializer=initializer,
        gate_kernel_initializer=initializer,
        seed=1,
    )
    layer.build((None, 6))
    # 3 levels of 6 experts of 2 layers; 3 gates in two levels and 2 in the last.
    assert len(checks.draws(layer)) == 36 + 8
    checks.assert_all_different(checks.draws(layer))
    own = [*layer.own_weights, *layer.shared_own_weights]
    parts = [row for weights in own for row in array(weights)]
    assert len(parts) == 3 * 2 + 2
    checks.assert_all_different(parts)
    # As the authors draw them: uniform in +-1 / sqrt(2).
    assert 0.35 < np.abs(parts).max() < 2**-0.5
    for gates in layer.gate_weights(rows(5, 6).astype("float32")):
        assert not np.allclose(array(gates)[:, 0], array(gates)[:, 1])


@checks.not_on_jax
def test_gates_of_a_second_level_read_the_first_one():
    layer = AdaTT(2, 1, 3, 2, num_shared_experts=1, dtype="float64")
    x = rows(4, 5)
    layer.build(x.shape)
    assert layer.gates[1].kernels[0].shape == (2, 3, 3)
    for first in (layer.experts[0], layer.gates[0]):
        kernel = array(first.kernels[0]).copy()
        kernel[:, 0] = 0.0
        first.kernels[0].assign(kernel)
    before = arrays(layer.gate_weights(x))
    x[:, 0] += 7.0
    for a, b in zip(arrays(layer.gate_weights(x)), before, strict=True):
        np.testing.assert_array_equal(a, b)


# Gates


@pytest.mark.parametrize("shared", [0, 2])
def test_gate_weights_sum_to_one(shared):
    layer = AdaTT(2, 2, 3, 2, num_shared_experts=shared, gate_dropout=0.5)
    x = rows(4, 3, 5).astype("float32")
    layer(x)
    found = layer.gate_weights(x)
    # The shared experts have a stream above the first level, and so a gate.
    streams = [2 + (shared > 0), 2]
    assert [gates.shape for gates in found] == [
        (4, 3, count, 4 + shared) for count in streams
    ]
    for gates in found:
        np.testing.assert_allclose(array(gates).sum(-1), 1.0, rtol=1e-5)


@checks.not_on_jax
def test_gate_dropout_renormalises():
    """With experts that all give 1, gates make 1 and the residual adds 1."""
    layer = AdaTT(1, 1, 1, 3, activation="linear", gate_dropout=0.6, seed=0)
    x = rows(40, 3).astype("float32")
    layer.build(x.shape)
    layer.experts[0].kernels[0].assign(np.zeros((3, 3, 1)))
    layer.experts[0].biases[0].assign(np.ones((3, 1)))
    assert (array(layer.gate_probabilities(layer.gates[0](x), True)) == 0).any()
    for output in layer(x, training=True):
        np.testing.assert_allclose(array(output), 2.0, rtol=1e-5)


@checks.not_on_jax
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"gate_dropout": 0.5}])
def test_dropout_follows_its_seed(options):
    checks.assert_dropout_follows_its_seed(
        lambda seed: AdaTT(2, 1, (8, 3), 2, seed=seed, **options),
        rows(30, 4).astype("float32"),
    )


def test_a_row_of_nan_stays_in_its_row():
    layer = AdaTT(2, 2, 3, 2, num_shared_experts=1)
    x = rows(3, 4).astype("float32")
    expected = arrays(layer(x))
    x[1] = np.nan
    for found, wanted in zip(arrays(layer(x)), expected, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_levels": 0}, r"`num_levels` must be an integer >= 1.*0"),
        ({"num_task_experts": 0}, r"`num_task_experts` must be an integer >= 1.*0"),
        ({"num_shared_experts": -1}, r"`num_shared_experts` must be .*>= 0.*-1"),
        ({"expert_units": None}, "`expert_units` must be given.*or `experts`"),
        ({"tasks": ["a", "a"]}, "must be unique. Received 'a' more than once"),
        ({"tasks": ["a:0"]}, "Received: 'a:0'"),
        ({"residual": "no"}, "`residual` must be True or False.*'no'"),
        ({"gate_use_bias": 1}, "`gate_use_bias` must be True or False.*=1"),
        (
            {"experts": [MLPExperts(2, 4)], "expert_units": None},
            "`experts` must hold a separate layer.*level.*num_levels=2",
        ),
        (
            {"experts": [MLPExperts(2, 4)] * 2, "expert_units": None},
            "`experts` must hold a separate layer for each level",
        ),
        (
            {"experts": [MLPExperts(2, 4), MLPExperts(3, 4)], "expert_units": None},
            r"`experts\[1\]` must hold 2 experts.*num_experts=3",
        ),
        (
            {
                "experts": [keras.layers.Dense(4), keras.layers.Dense(4)],
                "expert_units": None,
            },
            r"`experts\[0\]` must be a layer of keras_moe.experts.*Dense",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {
        "num_levels": 2,
        "num_task_experts": 1,
        "expert_units": 4,
        "tasks": ["a", "b"],
    }
    with pytest.raises(ValueError, match=message):
        AdaTT(**{**good, **arguments})


def test_experts_of_different_widths_are_refused():
    experts = LayerExperts([keras.layers.Dense(4), keras.layers.Dense(5)])
    with pytest.raises(ValueError, match=r"`layers` must map.*\(None, 5\)"):
        AdaTT(1, 1, None, 2, experts=experts)(np.ones((2, 3)))
