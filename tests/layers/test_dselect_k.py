"""DSelectK against the NumPy oracle, by hand, and what its selectors promise."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import DSelectK
from keras_moe.layers.dselect_k import smooth_step
from tests.support import backends, oracles, sharing_oracles
from tests.support.checks import not_on_jax

ORACLE = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)


def _array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def _randomised(layer, spread=1.0):
    """Random values for every weight, biases too: all of them, then by path.

    `spread` is that of the selectors: at 1 many bits are 0 or 1, at 0.1 few.
    """
    rng = np.random.default_rng(1)
    by_path = {}
    for variable in layer.trainable_variables:
        value = rng.normal(size=variable.shape)
        if "selector" in variable.path:
            value *= spread
        variable.assign(value)
        by_path[variable.path.removeprefix(f"{layer.name}/")] = value
    return list(by_path.values()), by_path


def _selected(layer, x, weights):
    """The selectors (n, t, k, e) by the oracle."""
    shape = (len(x), len(layer.tasks), layer.top_k, layer.num_bits)
    if layer.static:
        logits = np.broadcast_to(weights["selector_logits"], shape)
    else:
        logits = sharing_oracles.linear_gates(
            x, weights["selectors/kernel_0"], weights["selectors/bias_0"]
        ).reshape(shape)
    return sharing_oracles.selectors(logits, layer.num_experts, layer.gamma)


def _gates(layer, x, weights):
    """The gates (n, t, e) by the oracle."""
    selected = _selected(layer, x, weights)
    if layer.top_k == 1:
        return sharing_oracles.dselect_k_gates(selected)
    if layer.static:
        logits = np.broadcast_to(weights["mixing_logits"], selected.shape[:3])
    else:
        logits = sharing_oracles.linear_gates(
            x, weights["mixing/kernel_0"], weights["mixing/bias_0"]
        )
    return sharing_oracles.dselect_k_gates(selected, logits)


def _outputs(layer, x, weights, gate_x=None):
    kernels, biases = (
        [weights[path] for path in weights if f"experts/{kind}_" in path]
        for kind in ("kernel", "bias")
    )
    experts = oracles.mlp_experts(x, kernels, biases, oracles.relu, oracles.relu)
    gates = _gates(layer, x if gate_x is None else gate_x, weights)
    return sharing_oracles.mixtures(gates, experts)


class _WithLosses(keras.layers.Layer):
    """A DSelectK with what it adds as a loss as one more output."""

    def __init__(self, layer):
        super().__init__(dtype="float64")
        self.layer, self.built = layer, True
        self.added = []
        layer.add_loss = self.added.append

    def call(self, *inputs):
        self.added.clear()
        outputs = keras.tree.flatten(self.layer(*inputs))
        return [*outputs, sum(self.added)]


@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize(
    ("experts", "top_k", "units", "options"),
    [
        (4, 2, (5,), {}),
        (4, 1, (6, 5), {}),
        (3, 2, (6, 5), {}),
        (5, 3, (5,), {"gamma": 0.5, "entropy_loss_weight": 0.7}),
        (4, 2, (5,), {"gamma": 2.0, "entropy_loss_weight": 0.7}),
        (4, 2, (5,), {"static": True, "entropy_loss_weight": 0.7}),
        (3, 1, (6, 5), {"static": True}),
        (6, 2, (5,), {"gate_x": True, "entropy_loss_weight": 0.7}),
    ],
)
def test_outputs_losses_and_all_gradients_equal_the_oracle(
    experts, top_k, units, options, spread
):
    options = dict(options)
    separate_gates = options.pop("gate_x", False)
    layer = DSelectK(experts, units, ["a", "b"], top_k, dtype="float64", **options)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(4, 3))]
    if separate_gates:
        inputs.append(rng.normal(size=(4, 2)))
    layer.build(*[x.shape for x in inputs])
    values, weights = _randomised(layer, spread)
    if spread == 1.0:  # A selector that has left makes a loss of 1e6, or 1 / 0.
        _reach_an_expert(layer, inputs[-1], weights)
    cotangents = [rng.normal(size=(4, 5)) for _ in range(2)]

    def oracle():
        return _outputs(layer, inputs[0], weights, inputs[-1])

    def losses():
        selected = _selected(layer, inputs[-1], weights)
        return sharing_oracles.selection_loss(selected, layer.entropy_loss_weight)

    for output, expected in zip(layer(*inputs).values(), oracle(), strict=True):
        np.testing.assert_allclose(_array(output), expected, **ORACLE)

    has_losses = bool(layer.entropy_loss_weight) or experts in (3, 5, 6)
    whole = _WithLosses(layer) if has_losses else layer
    if has_losses:
        np.testing.assert_allclose(_array(whole(*inputs)[-1]), losses(), **ORACLE)
    by_weight, by_input = backends.gradients(
        whole, inputs, [*cotangents, *[np.array(1.0)] * has_losses]
    )
    expected = oracles.numeric_gradients(
        lambda: (
            sum((o * c).sum() for o, c in zip(oracle(), cotangents, strict=True))
            + (losses() if has_losses else 0.0)
        ),
        values + inputs,
    )
    for found, wanted in zip([*by_weight, *by_input], expected, strict=True):
        np.testing.assert_allclose(found, wanted, **GRADIENTS)


def _reach_an_expert(layer, x, weights):
    """Halve the selectors until each of them gives some weight to an expert."""
    for _ in range(9):
        if _selected(layer, x, weights).sum(-1).min() > 0.1:
            return
        for variable in layer.trainable_variables:
            if "selector" in variable.path:
                value = weights[variable.path.removeprefix(f"{layer.name}/")]
                value *= 0.5
                variable.assign(value)
    raise AssertionError("no selector reaches an expert")


@not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    d=st.integers(1, 4),
    e=st.integers(2, 9),
    t=st.integers(1, 3),
    k=st.integers(1, 3),
    static=st.booleans(),
)
def test_any_sizes_equal_the_oracle(n, d, e, t, k, static):
    layer = DSelectK(e, (3, 2), t, min(k, e), static=static, dtype="float64")
    x = np.random.default_rng(n).normal(size=(n, d))
    layer.build(x.shape)
    _, weights = _randomised(layer, 0.3)
    for output, wanted in zip(layer(x), _outputs(layer, x, weights), strict=True):
        np.testing.assert_allclose(_array(output), wanted, **ORACLE)
    np.testing.assert_allclose(
        _array(layer.gate_weights(x)), _gates(layer, x, weights), **ORACLE
    )


def test_smooth_step_by_hand():
    """At gamma = 1: S(1/4) = -2/64 + 3/8 + 1/2 = 27/32, and S(-x) = 1 - S(x).

    At gamma = 2 the same values lie twice as far out.
    """
    x = np.array([-9.0, -0.5, -0.25, 0.0, 0.25, 0.5, 9.0])
    expected = [0.0, 0.0, 5 / 32, 0.5, 27 / 32, 1.0, 1.0]
    np.testing.assert_array_equal(
        _array(smooth_step(ops.convert_to_tensor(x))), expected
    )
    np.testing.assert_array_equal(
        _array(smooth_step(ops.convert_to_tensor(2 * x), gamma=2.0)), expected
    )


@pytest.mark.parametrize("gamma", [1 / 3, 0.7, 1.0, 3.3])
def test_smooth_step_ends_exactly_at_0_and_1(gamma):
    ends = np.array([-gamma / 2 * 1.001, gamma / 2 * 1.001], "float32")
    found = _array(smooth_step(ops.convert_to_tensor(ends), gamma))
    np.testing.assert_array_equal(found, [0.0, 1.0])


def test_a_gate_by_hand():
    """Of 4 experts 2, bits (1, 0) and (S(1/4) = 27/32, 1), shares 3/4 and 1/4.

    Selector 1 is expert 0b10 = 2. Selector 2 has 5/32 of 0b01 = 1 and 27/32 of
    0b11 = 3. The gate: 3/4 on 2, 5/128 on 1, 27/128 on 3.
    """
    layer = DSelectK(4, 1, ["a"], 2, static=True, dtype="float64")
    x = np.zeros((2, 3))
    layer.build(x.shape)
    layer.selector_logits.assign([[[1.0, -1.0], [0.25, 1.0]]])
    layer.mixing_logits.assign([[np.log(3.0), 0.0]])
    found = _array(layer.gate_weights(x))
    expected = [0.0, 5 / 128, 3 / 4, 27 / 128]
    np.testing.assert_allclose(found, [[expected], [expected]], rtol=1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("experts", [2, 4, 8, 16])
@pytest.mark.parametrize("spread", [0.05, 0.5, 50.0])
def test_gates_sum_to_1_for_powers_of_two(experts, static, spread):
    layer = DSelectK(experts, 3, 3, 2, static=static)
    x = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")
    layer.build(x.shape)
    _randomised(layer, spread)
    weights = _array(layer.gate_weights(x))
    assert weights.shape == (20, 3, experts)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("experts", [8, 11])
def test_gates_of_settled_bits_weigh_at_most_k(experts, top_k, static):
    """Logits of 1 and more lie outside the step, whose width is 1."""
    layer = DSelectK(experts, 3, 2, top_k, static=static)
    x = np.array([[-2.0], [-1.0], [1.0], [3.0]], "float32")
    layer.build(x.shape)
    rng = np.random.default_rng(2)
    for variable in layer.trainable_variables:
        if "selector" in variable.path:
            bits = rng.choice([-1.0, 1.0], size=variable.shape)
            variable.assign(0.0 * bits if "bias" in variable.path else bits)
    weights = _array(layer.gate_weights(x))
    chosen = (weights > 0).sum(-1)
    assert (chosen <= top_k).all()
    if experts == 8:
        assert (chosen >= 1).all()
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_every_expert_can_be_chosen():
    layer = DSelectK(8, 3, 8, 1, static=True)
    x = np.zeros((1, 3), "float32")
    layer.build(x.shape)
    codes = list(itertools.product([-1.0, 1.0], repeat=3))
    layer.selector_logits.assign(np.array(codes)[:, None])
    np.testing.assert_array_equal(_array(layer.gate_weights(x))[0], np.eye(8))


@pytest.mark.parametrize("static", [False, True])
def test_gates_start_undecided_and_selectors_apart(static):
    """Bits start near 1/2, where the step is steepest, and no two selectors alike.

    By their biases they also differ for a row of zeros.
    """
    layer = DSelectK(8, 3, 2, 2, gamma=0.5, static=static)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    x[0] = 0.0
    weights = _array(layer.gate_weights(_called(layer, x)))
    np.testing.assert_allclose(weights, 1 / 8, atol=0.03)
    if static:
        logits = _array(layer.selector_logits).reshape((4, 3))
    else:
        logits = _array(layer.selectors(x)).reshape((-1, 3))
    assert np.abs(logits).max() < 0.05
    assert len(np.unique(logits, axis=0)) == len(logits)


def test_kernels_and_biases_of_gates_start_different():
    layer = DSelectK(8, 3, 2)
    layer.build((None, 1))
    for part in (layer.selectors, layer.mixing):
        kernel, bias = _array(part.kernels[0])[:, 0], _array(part.biases[0])
        assert not np.isclose(kernel, bias).any()


def _called(layer, x):
    layer.build(x.shape)
    return x


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("experts", [8, 6])
def test_the_losses_alone_make_gates_choose(experts, static):
    layer = DSelectK(experts, 3, 2, 2, entropy_loss_weight=0.1, static=static)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    model.compile(
        keras.optimizers.Adam(0.05), loss=[lambda y, p: ops.mean(0.0 * p)] * 2
    )
    x = np.tile(np.eye(4, dtype="float32"), (600, 1))
    y = [np.zeros((len(x), 3), "float32")] * 2
    before = (_array(layer.gate_weights(x)) > 0).sum(-1)
    assert (before == experts).all()
    model.fit(x, y, 8, verbose=0)
    weights = _array(layer.gate_weights(x))
    assert ((weights > 0).sum(-1) <= 2).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_losses_are_means_over_the_rows_that_count():
    layer = DSelectK(5, 3, 2, 2, entropy_loss_weight=0.7, dtype="float64")
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    layer.build(x.shape)
    _, weights = _randomised(layer, 0.1)
    selected = _selected(layer, x.reshape((6, 4)), weights)
    mask = np.array([[True, False, True], [True, False, False]])
    for rows, counted in [(None, [True] * 6), (mask, mask.ravel().tolist())]:
        layer(x, mask=None if rows is None else ops.convert_to_tensor(rows))
        found = sum(_array(loss) for loss in layer.losses)
        wanted = sharing_oracles.selection_loss(selected, 0.7, counted)
        np.testing.assert_allclose(found, wanted, **ORACLE)
    layer(x, mask=ops.zeros((2, 3), "bool"))
    assert sum(_array(loss) for loss in layer.losses) == 0


def test_a_mask_of_the_inputs_reaches_the_losses():
    layer = DSelectK(5, 3, 2, 2)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    x[:, 2:] = 0.0
    masked = keras.layers.Masking()(x)
    layer(masked)
    found = float(_array(layer.losses[0]))
    layer(x[:, :2])
    assert found == pytest.approx(float(_array(layer.losses[0])), rel=1e-5)


def test_a_mask_of_the_inputs_reaches_the_losses_beside_gate_inputs():
    layer = DSelectK(5, 3, 2, 2)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    gate_x = x[..., :2]
    x[:, 2:] = 0.0
    layer(keras.layers.Masking()(x), gate_x)
    found = float(_array(layer.losses[0]))
    layer(x[:, :2], gate_x[:, :2])
    assert found == pytest.approx(float(_array(layer.losses[0])), rel=1e-5)


def test_no_loss_without_need():
    layer = DSelectK(4, 3, 2)
    layer(np.ones((3, 6), "float32"))
    assert layer.losses == []


def test_a_selector_that_has_left_gives_numbers():
    """All bits at 1 spell 7, which is no expert of 5: the weights are 0."""
    layer = DSelectK(5, 3, 1, 1, static=True, entropy_loss_weight=0.1, dtype="float64")
    x = np.random.default_rng(0).normal(size=(4, 6))
    layer.build(x.shape)
    layer.selector_logits.assign(np.ones((1, 1, 3)))
    np.testing.assert_array_equal(_array(layer.gate_weights(x)), np.zeros((4, 1, 5)))
    whole = _WithLosses(layer)
    assert np.isfinite(_array(whole(x)[-1]))
    by_weight, _ = backends.gradients(whole, [x], [np.ones((4, 3)), np.array(1.0)])
    assert all(np.isfinite(gradient).all() for gradient in by_weight)


def test_static_gates_are_the_same_for_every_row():
    layer = DSelectK(4, 3, ["a", "b"], static=True)
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")
    weights = _array(layer.gate_weights(_called(layer, x)))
    assert weights.shape == (2, 5, 2, 4)
    np.testing.assert_array_equal(
        weights, np.broadcast_to(weights[:1, :1], weights.shape)
    )
    assert not np.allclose(weights[0, 0, 0], weights[0, 0, 1], atol=1e-6)


def test_gate_weights_are_what_call_uses():
    layer = DSelectK(4, 5, ["a", "b"])
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    outputs = layer(x)
    _randomised(layer, 0.2)
    outputs = layer(x)
    weights, experts = _array(layer.gate_weights(x)), _array(layer.experts(x))
    np.testing.assert_allclose(
        _array(outputs["b"]),
        (weights[:, 1, :, None] * experts).sum(1),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("static", [False, True])
def test_gates_stay_float32_in_half_precision(static):
    layer = DSelectK(6, 5, 2, static=static, dtype="mixed_float16")
    x = _called(layer, np.ones((3, 6), "float32"))
    weights = layer.gate_weights(x)
    assert keras.backend.standardize_dtype(weights.dtype) == "float32"
    layer(x)  # Where Keras casts variables, unless it is told not to.
    for loss in layer.losses:
        assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert len(layer.losses) == 1


def test_a_row_of_nan_stays_in_its_row():
    layer = DSelectK(4, 5, ["a"])
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    expected = _array(layer(x)["a"])
    x[1] = np.nan
    found = _array(layer(x)["a"])
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def test_default_names_are_readable():
    keras.backend.clear_session()
    assert [DSelectK(2, 2, 2).name for _ in range(2)] == ["dselect_k", "dselect_k_1"]
    assert DSelectK(2, 2, 2, name="given").name == "given"


def test_experts_may_be_any_layer():
    experts = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(12), keras.layers.Reshape((4, 3))]
    )
    layer = DSelectK(4, None, ["a", "b"], experts=experts)
    x = np.ones((5, 6), "float32")
    assert layer.compute_output_shape(x.shape) == {"a": (5, 3), "b": (5, 3)}
    assert layer(x)["a"].shape == (5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1}, "`num_experts` must be >= 2.*num_experts=1"),
        ({"num_experts": 2.0}, r"`num_experts` must be an integer >= 1.*2\.0"),
        ({"expert_units": None}, "`expert_units` must be"),
        ({"expert_units": (4, -1)}, r"`expert_units\[1\]` must be .*-1"),
        ({"tasks": []}, "`tasks` must name at least one task"),
        ({"top_k": 4}, "`top_k` must not exceed `num_experts`.*top_k=4.*=3"),
        ({"top_k": 0}, "`top_k` must be an integer >= 1"),
        ({"gamma": 0.0}, "`gamma` must be a finite number > 0"),
        (
            {"entropy_loss_weight": float("inf")},
            "`entropy_loss_weight` must be a finite.*inf",
        ),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"experts": 3, "expert_units": None}, "`experts` must be a Keras layer"),
        ({"experts": MLPExperts(3, 4)}, "`expert_units` must be None"),
        (
            {"experts": MLPExperts(2, 4), "expert_units": None},
            "num_experts=3, experts.num_experts=2",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"num_experts": 3, "expert_units": 4, "tasks": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        DSelectK(**{**good, **arguments})


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"`gate_inputs`.*\(5, 6\).*\(4, 2\)"):
        DSelectK(4, 3, 2)(np.ones((5, 6)), np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"`gate_inputs` must be None.*\(5, 2\)"):
        DSelectK(4, 3, 2, static=True)(np.ones((5, 6)), np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"`experts` must map .* instead of"):
        DSelectK(4, None, 2, experts=keras.layers.Dense(4))(np.ones((5, 6)))
    with pytest.raises(ValueError, match="Received an input of shape"):
        DSelectK(4, 3, 2).build((4,))
