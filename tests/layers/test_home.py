"""HoME against the NumPy oracle, and what is left of it without its gates."""

import keras
import numpy as np
import pytest

from keras_moe.experts import MLPExperts
from keras_moe.layers import PLE, HoME
from tests.support import checks, multitask_oracles, oracles
from tests.support.checks import array, arrays, rows

D, U = 2, 2
NO_GATES = {"feature_gate_rank": 0, "self_gate": False}
PLAIN = {**NO_GATES, "expert_normalization": False}


def experts_of(layer, level, values, training):
    """The experts of a level with their feature gates and norms, one by one."""
    normal = layer.expert_normalization
    final = oracles.linear if normal else oracles.relu
    mlps = checks.mlps(layer.experts[level], values, oracles.relu, final)

    def expert(k):
        def call(x):
            if layer.feature_gate_rank:
                b, a = (values[id(w)] for w in layer.feature_gates[level].kernels)
                x = multitask_oracles.feature_gate(x, b[k], a[k])
            x = mlps[k](x)
            if not normal:
                return x
            norm, own = layer.norms[level], slice(k * U, (k + 1) * U)
            statistics = array(norm.moving_mean)[own], array(norm.moving_variance)[own]
            x = multitask_oracles.batch_normalization(
                x,
                values[id(norm.gamma)][own],
                values[id(norm.beta)][own],
                None if training else statistics,
            )
            return multitask_oracles.silu(x)

        return call

    return [expert(k) for k in range(len(mlps))]


def oracle(layer, values, training=False):
    """The layer as a function of rows (n, d) that reads `values`."""

    def gates(name):
        return checks.mlps(getattr(layer, name), values) if layer.self_gate else None

    shared_self_gates = gates("shared_self_gate")
    meta = {
        "experts": experts_of(layer, 0, values, training),
        "gates": checks.mlps(layer.group_gates, values),
        "self_gates": gates("group_self_gates"),
        "shared_gate": checks.mlps(layer.shared_gate, values)[0],
        "shared_self_gate": shared_self_gates and shared_self_gates[0],
    }
    task = {
        "experts": experts_of(layer, 1, values, training),
        "gates": checks.mlps(layer.task_gates, values),
        "self_gates": gates("task_self_gates"),
    }
    groups = layer.groups or [list(range(len(layer.tasks)))]
    group_of_task = [
        [k in group for group in groups].index(True) for k in range(len(layer.tasks))
    ]
    return lambda x: multitask_oracles.home(
        x, meta, task, group_of_task, layer.num_task_experts, layer.gate_temperature
    )


def randomised(layer):
    """Random weights, and random statistics where there are some."""
    rng = np.random.default_rng(4)
    for norm in layer.norms:
        if norm is not None:
            norm.moving_mean.assign(rng.normal(size=norm.moving_mean.shape))
            norm.moving_variance.assign(rng.uniform(0.5, 2, norm.moving_mean.shape))
    return checks.randomised(layer)


def check(layer, *leading, training=False):
    """Outputs and all gradients of a layer are those of the oracle."""
    x = rows(*leading, D)
    layer.build(x.shape)
    values = randomised(layer)
    # The statistics are read now: a call in training moves them.
    call, flat = oracle(layer, values, training), x.reshape(-1, D)

    def expected():
        return [output.reshape(*leading, U) for output in call(flat)]

    tolerance = checks.OUTPUTS, checks.GRADIENTS
    if layer.expert_normalization and keras.backend.backend() == "jax":
        # Keras 3.15 normalises in float32 there, whatever the dtype of the layer.
        tolerance = [{"rtol": 1e-4, "atol": 1e-5}] * 2
    checks.check(layer, [x], expected, values, tolerance=tolerance, training=training)


@pytest.mark.parametrize(
    ("tasks", "groups", "own", "shared", "options"),
    checks.few_on_jax(
        [
            (1, None, 1, 1, {}),
            (2, None, 2, 1, {"units": (3, U)}),
            (3, [[0, 2], [1]], 1, 2, {}),
            (3, [[2], [1], [0]], 1, 1, {"gate_temperature": 0.5}),
            (2, [[1], [0]], 1, 2, {"gate_units": (2,), "gate_use_bias": True}),
            (2, [[1], [0]], 1, 1, {"self_gate": False}),
            (3, [[2], [0, 1]], 1, 1, {"feature_gate_rank": 0}),
            (2, [[0], [1]], 1, 2, {"expert_normalization": False, "units": (3, U)}),
            (3, [[1, 2], [0]], 2, 1, PLAIN),
        ],
        2,
        8,
    ),
)
def test_outputs_and_all_gradients_equal_the_oracle(
    tasks, groups, own, shared, options
):
    options = {"feature_gate_rank": 1, **options}
    units = options.pop("units", U)
    layer = HoME(shared, own, units, tasks, groups=groups, dtype="float64", **options)
    check(layer, 3)


@pytest.mark.parametrize("groups", [None, [[1], [0]]])
def test_the_statistics_of_the_batch_equal_the_oracle_in_training(groups):
    layer = HoME(1, 1, U, 2, groups=groups, feature_gate_rank=2, dtype="float64")
    check(layer, 5, training=True)


def test_further_axes_are_rows():
    options = {"groups": [[1], [0]], "feature_gate_rank": 1, "dtype": "float64"}
    check(HoME(1, 1, U, 2, **options), 2, 2)
    check(HoME(1, 1, U, 2, **options), 2, 2, training=True)


def test_by_hand():
    """One group of two tasks, everything linear, even gates, and no self gates.

    At x = 1 the meta experts give 2 (the group's) and -1 (shared): both streams are
    0.5. Above, the experts of the tasks are 4x and -4x, that of the group 2x, the
    shared one x + 1. At 0.5 they are 2, -2, 1 and 1.5, so that "a" is 4.5 / 3 and "b"
    is 0.5 / 3. Self gates of sigmoid(0) add half a stream's own experts: the group's
    stream is 1.5, the shared one 0. Then the experts are 6, -6, 3 and 1: "a" is
    10 / 3 + 3 and "b" is -2 / 3 - 3.
    """
    for self_gate, a, b in [(False, 1.5, 0.5 / 3), (True, 19 / 3, -11 / 3)]:
        layer = HoME(
            1,
            1,
            1,
            ["a", "b"],
            expert_normalization=False,
            feature_gate_rank=0,
            self_gate=self_gate,
            activation="linear",
            gate_kernel_initializer="zeros",
            dtype="float64",
        )
        x = np.ones((1, 1))
        layer.build(x.shape)
        layer.experts[0].kernels[0].assign([[[2.0]], [[-1.0]]])
        layer.experts[1].kernels[0].assign([[[4.0]], [[-4.0]], [[2.0]], [[1.0]]])
        layer.experts[1].biases[0].assign([[0.0], [0.0], [0.0], [1.0]])
        outputs = layer(x)
        np.testing.assert_allclose(array(outputs["a"]), [[a]], atol=1e-12)
        np.testing.assert_allclose(array(outputs["b"]), [[b]], atol=1e-12)


# Without its parts


def copy_weights(source, target):
    """Give `target` the weights that it shares with `source`, by their names."""
    known = {w.path.split("/", 1)[1]: array(w) for w in source.weights}
    for weight in target.weights:
        weight.assign(known[weight.path.split("/", 1)[1]])


@checks.not_on_jax
@pytest.mark.parametrize("normal", [True, False])
def test_with_open_feature_gates_and_closed_self_gates_it_is_its_plain_counterpart(
    normal,
):
    """2 sigmoid(0) = 1 leaves a stream as it is; sigmoid(-1000) = 0 adds nothing."""
    options = {
        "groups": [["a", "c"], ["b"]],
        "expert_normalization": normal,
        "gate_use_bias": True,
        "dtype": "float64",
    }
    gated, plain = (
        HoME(1, 1, (4, 2), ["a", "b", "c"], **options, **given)
        for given in ({"feature_gate_rank": 3}, NO_GATES)
    )
    # Their norms are named alike, so that their weights are.
    for layer in (gated, plain):
        for level, norm in enumerate(layer.norms):
            if norm is not None:
                norm.name = f"norm_{level}"
    x = rows(5, 3)
    gated(x), plain(x)
    randomised(gated)
    copy_weights(gated, plain)
    for a, b in zip(arrays(gated(x)), arrays(plain(x)), strict=True):
        assert not np.allclose(a, b)
    for gates in gated.feature_gates:
        gates.kernels[0].assign(np.zeros(gates.kernels[0].shape))
    for gates in (
        gated.group_self_gates,
        gated.shared_self_gate,
        gated.task_self_gates,
    ):
        gates.kernels[0].assign(np.zeros(gates.kernels[0].shape))
        gates.biases[0].assign(np.full(gates.biases[0].shape, -1000.0))
    for a, b in zip(arrays(gated(x)), arrays(plain(x)), strict=True):
        np.testing.assert_allclose(a, b, **checks.OUTPUTS)


@checks.not_on_jax
def test_plain_with_a_group_for_each_task_is_a_ple():
    """If its gates neither read the shared stream nor weigh the groups' experts."""
    t, m, s, u = 3, 2, 1, 4
    home = HoME(
        s, m, u, t, groups=[[0], [1], [2]], gate_use_bias=True, dtype="float64", **PLAIN
    )
    ple = PLE(2, s, m, u, t, gate_use_bias=True, dtype="float64")
    x = rows(5, 3)
    home(x), ple(x)
    checks.randomised(ple)
    home.experts[0].set_weights(ple.experts[0].get_weights())
    home.group_gates.set_weights(ple.gates[0].get_weights())
    home.shared_gate.set_weights(ple.shared_gates[0].get_weights())
    for mine, theirs in zip(
        home.experts[1].weights, ple.experts[1].weights, strict=True
    ):
        value, known = array(mine).copy(), array(theirs)
        value[: t * m], value[2 * t * m :] = known[: t * m], known[t * m :]
        mine.assign(value)
    kernel, bias = np.zeros((t, 2 * u, 2 * m + s)), np.full((t, 2 * m + s), -1000.0)
    seen = [*range(m), *range(2 * m, 2 * m + s)]
    kernel[:, :u, seen] = array(ple.gates[1].kernels[0])
    bias[:, seen] = array(ple.gates[1].biases[0])
    home.task_gates.kernels[0].assign(kernel)
    home.task_gates.biases[0].assign(bias)
    for a, b in zip(home(x), ple(x), strict=True):
        np.testing.assert_allclose(array(a), array(b), **checks.OUTPUTS)


# The hierarchy


@checks.not_on_jax
def test_groups_by_name_are_groups_by_number():
    x = rows(4, 3)
    named = HoME(1, 1, 2, ["a", "b", "c"], groups=[["c", "a"], ["b"]])
    counted = HoME(1, 1, 2, 3, groups=[[2, 0], [1]])
    named(x), counted(x)
    counted.set_weights(named.get_weights())
    for a, b in zip(arrays(named(x)), arrays(counted(x)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert named.group_of_task == [0, 1, 0]


@checks.not_on_jax
def test_a_task_reads_only_its_own_experts_its_groups_and_shared_ones():
    """At the task level: 4 experts of tasks, 2 of groups, 1 shared."""
    layer = HoME(1, 1, 3, 4, groups=[[0, 3], [1, 2]], dtype="float64")
    x = rows(5, 3)
    before = arrays(layer(x))
    readers = {0: {0}, 1: {1}, 2: {2}, 3: {3}, 4: {0, 3}, 5: {1, 2}, 6: {0, 1, 2, 3}}
    bias = layer.experts[1].biases[0]
    for expert, expected in readers.items():
        still, value = array(bias).copy(), array(bias).copy()
        value[expert] += 1.0
        bias.assign(value)
        after = arrays(layer(x))
        bias.assign(still)
        found = {k for k in range(4) if not np.array_equal(after[k], before[k])}
        assert found == expected


@checks.not_on_jax
def test_a_task_whose_name_begins_another_is_of_its_own_group():
    tasks = ["like_x", "like", "x"]
    layer = HoME(1, 1, 3, tasks, groups=[["like"], ["x", "like_x"]], dtype="float64")
    x = rows(5, 3)
    before = layer(x)
    bias = layer.experts[1].biases[0]
    value = array(bias).copy()
    value[3] += 1.0  # Behind the three of the tasks: that of the group of "like".
    bias.assign(value)
    after = layer(x)
    for name in tasks:
        same = np.array_equal(array(after[name]), array(before[name]))
        assert same == (name != "like")


@checks.not_on_jax
def test_statistics_move_in_training_alone():
    layer = HoME(1, 1, 3, 2)
    x = rows(20, 4).astype("float32")
    layer(x)
    before = [array(norm.moving_mean).copy() for norm in layer.norms]
    layer(x, training=False)
    for norm, value in zip(layer.norms, before, strict=True):
        np.testing.assert_array_equal(array(norm.moving_mean), value)
    layer(x, training=True)
    for norm, value in zip(layer.norms, before, strict=True):
        assert (array(norm.moving_mean) != value).all()


# Faults seen elsewhere


@checks.not_on_jax
def test_experts_and_gates_start_different_from_one_seed():
    initializer = keras.initializers.GlorotUniform(seed=1)
    layer = HoME(
        2,
        2,
        (6, 6),
        2,
        groups=[[0], [1]],
        feature_gate_rank=6,
        kernel_initializer=initializer,
        gate_kernel_initializer=initializer,
    )
    layer.build((None, 6))
    # 6 and 10 experts, each of 2 layers and a feature gate of 2; 2 gates of groups,
    # 1 shared one, 2 of tasks, and as many self gates.
    assert len(checks.draws(layer)) == 4 * 16 + 2 * 5
    checks.assert_all_different(checks.draws(layer))


def test_gates_of_the_task_level_read_both_streams_of_the_first():
    layer = HoME(1, 1, 3, 2, groups=[[0], [1]], gate_units=(4,))
    layer.build((None, 5))
    for gates in (layer.task_gates, layer.task_self_gates):
        assert gates.kernels[0].shape == (2, 6, 4)


def test_gates_sum_to_one_and_are_those_of_the_call():
    """With equal experts of all kinds only the sum of a gate counts: 1."""
    layer = HoME(2, 1, U, 3, groups=[[0, 2], [1]], **PLAIN)
    x = rows(5, D)
    layer.build(x.shape)
    for experts in layer.experts:
        for weight in (*experts.kernels, *experts.biases):
            first = array(weight)[:1]
            weight.assign(np.repeat(first, weight.shape[0], axis=0))
    groups, tasks = layer.gate_weights(x)
    assert groups.shape == (5, 2, 3)
    assert tasks.shape == (5, 3, 4)
    for gates in (groups, tasks):
        np.testing.assert_allclose(array(gates).sum(-1), 1, atol=1e-6)
    assert np.abs(array(tasks) - 1 / 4).max() > 0.01
    outputs = [array(output) for output in layer(x)]
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-6)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)


@checks.not_on_jax
def test_gate_dropout_renormalises():
    """With experts that all give 1, any gates that sum to 1 give 1."""
    layer = HoME(1, 2, 1, 2, activation="linear", gate_dropout=0.6, seed=0, **PLAIN)
    x = rows(40, 3).astype("float32")
    layer.build(x.shape)
    for experts in layer.experts:
        experts.kernels[0].assign(np.zeros(experts.kernels[0].shape))
        experts.biases[0].assign(np.ones(experts.biases[0].shape))
    assert (array(layer.gate_probabilities(layer.group_gates(x), True)) == 0).any()
    for output in layer(x, training=True):
        np.testing.assert_allclose(array(output), 1.0, rtol=1e-5)


@checks.not_on_jax
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"gate_dropout": 0.5}])
def test_dropout_follows_its_seed(options):
    checks.assert_dropout_follows_its_seed(
        lambda seed: HoME(1, 1, (8, 3), 2, seed=seed, **options),
        rows(30, 4).astype("float32"),
    )


def test_a_row_of_nan_stays_in_its_row_in_inference():
    layer = HoME(1, 1, 3, 2)
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
        ({"num_shared_experts": 0}, r"`num_shared_experts` must be an .*>= 1.*0"),
        ({"num_task_experts": 0}, r"`num_task_experts` must be an integer >= 1.*0"),
        ({"expert_units": ()}, "`expert_units` must name at least one layer"),
        ({"expert_units": None}, "`expert_units` must be given"),
        ({"tasks": ["a", "a"]}, "must be unique. Received 'a' more than once"),
        ({"tasks": ["a b"]}, "Received: 'a b'"),
        ({"feature_gate_rank": -1}, r"`feature_gate_rank` must be .*>= 0.*-1"),
        ({"experts": MLPExperts(3, 4)}, "`experts` must be None.*MLPExperts"),
        (
            {"groups": [["a"]]},
            r"`groups` must .* every task exactly once.*\[\['a'\]\].*'b'",
        ),
        ({"groups": [["a", "b"], ["b"]]}, "`groups` must .* every task exactly once"),
        ({"groups": [["a", "a"]]}, "`groups` must .* every task exactly once"),
        ({"groups": [["a"], ["c"]]}, "`groups` must .* every task exactly once.*'c'"),
        ({"groups": [["a", "b"], []]}, "`groups` must .* every task exactly once"),
        ({"groups": [[0], [1]]}, "`groups` must .* every task exactly once"),
        ({"groups": ["ab"]}, "`groups` must .* every task exactly once.*'ab'"),
        ({"self_gate": None}, "`self_gate` must be True or False.*None"),
        ({"expert_normalization": 0}, "`expert_normalization` must be True or.*=0"),
        ({"groups": 2}, "`groups` must .* every task exactly once.*groups=2"),
        (
            {"tasks": 2, "groups": [[1], [2]]},
            "`groups` must .* every task exactly once",
        ),
        ({"tasks": 2, "groups": [0, 1]}, "`groups` must .* every task exactly once"),
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
        HoME(**{**good, **arguments})


def test_padding_has_no_part_in_the_statistics():
    x = rows(2, 3, D).astype("float32")
    mask = np.array([[True, True, True], [True, False, False]])
    outputs = []
    for padding in (0.0, 50.0):
        layer = HoME(
            1,
            1,
            U,
            2,
            seed=0,
            kernel_initializer=keras.initializers.RandomNormal(seed=3),
            gate_kernel_initializer=keras.initializers.RandomNormal(seed=4),
            **NO_GATES,
        )
        x[~mask] = padding
        outputs.append(layer(x, mask=mask, training=True))
        mean = array(layer.norms[0].moving_mean)
        outputs[-1] = [array(output)[mask] for output in outputs[-1]] + [mean]
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
