"""STEM against the NumPy oracle, and what its task-wise backward pass lets through."""

import keras
import numpy as np
import pytest

from keras_moe.experts import LayerExperts, MLPExperts
from keras_moe.layers import STEM, MMoE
from tests.support import backends, checks, multitask_oracles
from tests.support.checks import array, arrays, rows

D, U = 2, 2


def oracle(layer, inputs, levels, held=None):
    """The outputs for inputs (..., d), or those and the tasks' (..., t, d)."""
    leading, t = inputs[0].shape[:-1], len(layer.tasks)
    x = inputs[0].reshape(-1, D)
    task_x = inputs[1].reshape(-1, t, D) if len(inputs) > 1 else np.stack([x] * t, 1)
    outputs, to_hold = multitask_oracles.stem(
        x, task_x, levels, t, layer.num_task_experts, layer.gate_temperature, held
    )
    return [output.reshape(*leading, -1) for output in outputs], to_hold


def check(layer, *leading, task_inputs=True):
    """Outputs and all gradients of a layer are those of the oracle."""
    inputs = [rows(*leading, D)]
    if task_inputs:
        inputs.append(rows(*leading, len(layer.tasks), D, seed=1))
    layer.build(*[x.shape for x in inputs])
    values = checks.randomised(layer)
    levels = checks.levels_of(layer, values)
    _, held = oracle(layer, inputs, levels)
    checks.check(
        layer,
        inputs,
        lambda: oracle(layer, inputs, levels)[0],
        values,
        moving=lambda: oracle(layer, inputs, levels, held)[0],
    )


@pytest.mark.parametrize("task_inputs", [True, False])
@pytest.mark.parametrize(
    ("shared", "own", "tasks", "options"),
    checks.few_on_jax(
        [
            (1, 1, 1, {}),
            (2, 1, 2, {"units": (3, U)}),
            (1, 2, 3, {"gate_temperature": 0.5}),
            (1, 2, 2, {"gate_units": (3,), "gate_use_bias": True}),
            (1, 1, 2, {"num_levels": 2}),
            (2, 2, 2, {"num_levels": 3}),
        ],
        3,
        4,
    ),
)
def test_outputs_and_all_gradients_equal_the_oracle(
    shared, own, tasks, options, task_inputs
):
    options = dict(options)
    units = options.pop("units", U)
    layer = STEM(shared, own, units, tasks, dtype="float64", **options)
    check(layer, 3, task_inputs=task_inputs)


@pytest.mark.parametrize("task_inputs", [True, False])
def test_further_axes_are_rows(task_inputs):
    layer = STEM(1, 1, U, 2, num_levels=2, dtype="float64")
    check(layer, 2, 3, task_inputs=task_inputs)


def test_kinds_of_experts_may_change_from_level_to_level():
    experts = [checks.layer_experts(4, 3), checks.glu_experts(4, U)]
    layer = STEM(2, 1, None, 2, num_levels=2, experts=experts, dtype="float64")
    shapes = (None, D), (None, 2, D)
    assert layer.compute_output_shape(*shapes) == [(None, U)] * 2
    check(layer, 3)


def test_by_hand():
    """Experts 2x and -x of the tasks, x + 1 shared; even gates.

    At shared embeddings of 1 and those of the tasks, 2 and 3, the experts give 4, -3
    and 2: both tasks are 1. Of the sum of both outputs, 2 * (4 - 3 + 2) / 3, each
    task's experts have the third of one output: by x_a 2/3, by x_b -1/3. The shared
    ones have both: by x_s 2/3.
    """
    layer = STEM(
        1,
        1,
        1,
        ["a", "b"],
        activation="linear",
        gate_kernel_initializer="zeros",
        dtype="float64",
    )
    inputs = [np.array([[1.0]]), np.array([[[2.0], [3.0]]])]
    layer.build(*[x.shape for x in inputs])
    layer.experts[0].kernels[0].assign([[[2.0]], [[-1.0]], [[1.0]]])
    layer.experts[0].biases[0].assign([[0.0], [0.0], [1.0]])
    for output in layer(*inputs).values():
        np.testing.assert_allclose(array(output), [[1.0]])
    _, (by_shared, by_tasks) = backends.gradients(layer, inputs, [np.ones((1, 1))] * 2)
    np.testing.assert_allclose(by_shared, [[2 / 3]])
    np.testing.assert_allclose(by_tasks, [[[2 / 3], [-1 / 3]]])


# All forward, task-wise backward


def gradients_of_task(layer, inputs, task):
    """Gradients of one task's output: by the weights' paths, and by the inputs."""
    cotangents = [
        rows(*output.shape) if k == task else np.zeros(output.shape)
        for k, output in enumerate(arrays(layer(*inputs)))
    ]
    by_weight, by_input = backends.gradients(layer, inputs, cotangents)
    paths = [weight.path for weight in layer.trainable_variables]
    return dict(zip(paths, by_weight, strict=True)), by_input


def built(levels, t=3, m=2, s=2):
    layer = STEM(s, m, (4, 3), t, num_levels=levels, activation="tanh", dtype="float64")
    inputs = [rows(5, 4), rows(5, t, 4, seed=1)]
    layer.build(*[x.shape for x in inputs])
    checks.randomised(layer)
    return layer, inputs


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_task_teaches_no_experts_or_embeddings_of_others(task, levels):
    """Exactly, at every level; its own and the shared ones it teaches."""
    layer, inputs = built(levels)
    by_weight, (by_shared, by_tasks) = gradients_of_task(layer, inputs, task)
    for experts in layer.experts:
        for weight in experts.weights:
            gradient = by_weight[weight.path]  # (t * m + s, ...)
            for owner in range(3):
                own = gradient[2 * owner : 2 * owner + 2]
                assert (own != 0).any() == (owner == task), weight.path
            assert (gradient[6] != 0).any(), weight.path
            assert (gradient[7] != 0).any(), weight.path
    for gates in layer.gates:
        for weight in gates.weights:
            gradient = by_weight[weight.path]  # (t, ...)
            for owner in range(3):
                assert (gradient[owner] != 0).any() == (owner == task), weight.path
    for owner in range(3):
        assert (by_tasks[:, owner] != 0).any() == (owner == task)
    assert (by_shared != 0).any()


@checks.not_on_jax
@pytest.mark.parametrize("levels", [1, 2])
def test_a_task_reads_experts_and_embeddings_of_others(levels):
    layer, inputs = built(levels)
    before = arrays(layer(*inputs))
    moved = inputs[1].copy()
    moved[:, 1] += 1.0
    for a, b in zip(arrays(layer(inputs[0], moved)), before, strict=True):
        assert (np.abs(a - b) > 1e-6).any(axis=1).all()
    for experts in layer.experts:
        bias = experts.biases[-1]
        value, still = array(bias).copy(), array(bias).copy()
        value[2:4] += 1.0  # Those of the second task.
        bias.assign(value)
        for a, b in zip(arrays(layer(*inputs)), before, strict=True):
            assert (np.abs(a - b) > 1e-6).any(axis=1).all()
        bias.assign(still)


@checks.not_on_jax
def test_forward_is_an_mmoe_with_gates_of_twice_the_input():
    """One level, and no embeddings but the shared ones: W (x + x) = (2 W) x."""
    x = rows(5, 3)
    stem, mmoe = (
        STEM(1, 2, (4, 2), 2, dtype="float64"),
        MMoE(5, (4, 2), 2, dtype="float64"),
    )
    stem(x), mmoe(x)
    mmoe.set_weights(stem.get_weights())
    mmoe.gates.kernels[0].assign(2.0 * array(stem.gates[0].kernels[0]))
    for a, b in zip(stem(x), mmoe(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


@checks.not_on_jax
def test_task_inputs_may_come_after_inputs_alone():
    layer = STEM(1, 1, 2, 2, dtype="float64")
    x = rows(4, 3)
    alone = arrays(layer(x))
    for a, b in zip(arrays(layer(x, np.stack([x, x], 1))), alone, strict=True):
        np.testing.assert_allclose(a, b, **checks.OUTPUTS)
    for a, b in zip(arrays(layer(x, np.stack([x, -x], 1))), alone, strict=True):
        assert not np.allclose(a, b)


# Faults seen elsewhere


@checks.not_on_jax
def test_a_task_whose_name_begins_another_has_its_own_embeddings():
    layer = STEM(1, 1, 3, ["like_x", "like"], dtype="float64")
    inputs = [rows(4, 3), rows(4, 2, 3, seed=1)]
    layer.build(*[x.shape for x in inputs])
    # Flat outputs are in the order of the names: "like" comes first.
    found = backends.gradients(layer, inputs, [np.ones((4, 3)), np.zeros((4, 3))])
    by_tasks = found[1][1]
    assert (by_tasks[:, 0] == 0).all()
    assert (by_tasks[:, 1] != 0).any()


@checks.not_on_jax
def test_experts_and_gates_start_different_from_one_seed():
    initializer = keras.initializers.GlorotUniform(seed=1)
    layer = STEM(
        1,
        1,
        (3, 3),
        2,
        num_levels=3,
        kernel_initializer=initializer,
        gate_kernel_initializer=initializer,
    )
    layer.build((None, 3))
    # 3 levels of 3 experts of 2 layers, 3 of 2 gates, and 2 shared gates.
    assert len(checks.draws(layer)) == 18 + 6 + 2
    checks.assert_all_different(checks.draws(layer))


@checks.not_on_jax
def test_gates_of_a_second_level_read_the_first_one():
    layer = STEM(1, 1, 3, 2, num_levels=2, dtype="float64")
    inputs = [rows(4, 5), rows(4, 2, 5, seed=1)]
    layer.build(*[x.shape for x in inputs])
    assert layer.gates[1].kernels[0].shape == (2, 3, 3)
    for first in (layer.experts[0], layer.gates[0], layer.shared_gates[0]):
        kernel = array(first.kernels[0]).copy()
        kernel[:, 0] = 0.0
        first.kernels[0].assign(kernel)
    before = arrays(layer.gate_weights(*inputs))
    for x in inputs:
        x[..., 0] += 7.0
    for a, b in zip(arrays(layer.gate_weights(*inputs)), before, strict=True):
        np.testing.assert_array_equal(a, b)


# Gates


@pytest.mark.parametrize("task_inputs", [True, False])
def test_gate_weights_sum_to_one(task_inputs):
    layer = STEM(1, 2, 3, 2, num_levels=2, gate_dropout=0.5)
    inputs = [rows(4, 3, 5).astype("float32")]
    if task_inputs:
        inputs.append(rows(4, 3, 2, 5).astype("float32"))
    layer(*inputs)
    found = layer.gate_weights(*inputs)
    assert [gates.shape for gates in found] == [(4, 3, 2, 5)] * 2
    for gates in found:
        np.testing.assert_allclose(array(gates).sum(-1), 1.0, rtol=1e-5)


@checks.not_on_jax
def test_gate_dropout_renormalises():
    """With experts that all give 1, any gates that sum to 1 give 1."""
    layer = STEM(1, 1, 1, 2, activation="linear", gate_dropout=0.6, seed=0)
    x = rows(40, 3).astype("float32")
    layer.build(x.shape)
    layer.experts[0].kernels[0].assign(np.zeros((3, 3, 1)))
    layer.experts[0].biases[0].assign(np.ones((3, 1)))
    assert (array(layer.gate_probabilities(layer.gates[0](x), True)) == 0).any()
    for output in layer(x, training=True):
        np.testing.assert_allclose(array(output), 1.0, rtol=1e-5)


@checks.not_on_jax
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"gate_dropout": 0.5}])
def test_dropout_follows_its_seed(options):
    checks.assert_dropout_follows_its_seed(
        lambda seed: STEM(1, 1, (8, 3), 2, num_levels=2, seed=seed, **options),
        rows(30, 4).astype("float32"),
    )


def test_a_row_of_nan_stays_in_its_row():
    layer = STEM(1, 1, 3, 2, num_levels=2)
    inputs = [rows(3, 4).astype("float32"), rows(3, 2, 4, seed=1).astype("float32")]
    expected = arrays(layer(*inputs))
    inputs[1][1, 0] = np.nan
    for found, wanted in zip(arrays(layer(*inputs)), expected, strict=True):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shared_experts": 0}, r"`num_shared_experts` must be an .*>= 1.*0"),
        ({"num_task_experts": 0}, r"`num_task_experts` must be an integer >= 1.*0"),
        ({"num_levels": 0}, r"`num_levels` must be an integer >= 1.*0"),
        ({"expert_units": None}, "`expert_units` must be given.*or `experts`"),
        ({"tasks": ["a", "a"]}, "must be unique. Received 'a' more than once"),
        ({"tasks": ["a b"]}, "Received: 'a b'"),
        (
            {"experts": [MLPExperts(3, 4)] * 2, "expert_units": None},
            "`experts` must hold a separate layer for each level.*num_levels=1",
        ),
        (
            {"experts": MLPExperts(2, 4), "expert_units": None},
            r"`experts\[0\]` must hold 3 experts.*num_experts=2",
        ),
        (
            {"experts": keras.layers.Dense(4), "expert_units": None},
            r"`experts\[0\]` must be a layer of keras_moe.experts.*Dense",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {
        "num_shared_experts": 1,
        "num_task_experts": 1,
        "expert_units": 4,
        "tasks": ["a", "b"],
    }
    with pytest.raises(ValueError, match=message):
        STEM(**{**good, **arguments})


@pytest.mark.parametrize(
    "shape", [(5, 3, 4), (5, 2, 3), (4, 2, 4), (5, 4), (5, 2), (5, 1, 2, 4)]
)
def test_task_inputs_of_another_shape_are_refused(shape):
    """Where the layer is built, and where it is already."""
    message = rf"`task_inputs` must have the shape .*\(5, 2, 4\).*\({shape[0]}, "
    layer = STEM(1, 1, 3, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer(np.ones((5, 4)), np.ones(shape))
        layer = STEM(1, 1, 3, 2)
        layer(np.ones((5, 4)))


def test_experts_of_different_widths_are_refused():
    experts = LayerExperts([keras.layers.Dense(units) for units in (4, 4, 5)])
    with pytest.raises(ValueError, match=r"`layers` must map.*\(None, 5\)"):
        STEM(1, 1, None, 2, experts=experts)(np.ones((2, 3)))
