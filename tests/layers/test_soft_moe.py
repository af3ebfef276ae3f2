"""SoftMoE against a NumPy oracle, with masks and broken tokens, and by hand.

Axis letters: b sequences, t tokens, d input features, e experts, s slots an expert,
m = e * s slots of all experts, u output units.
"""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers.soft_moe import SoftMoE
from tests.support import backends, oracles
from tests.support.checks import not_on_jax

ORACLE = backends.tolerance(1e-6, 1e-8)
GRADIENTS = backends.tolerance(1e-5, 1e-7)


def oracle(x, phi, scale, kernels, biases, mask=None):
    """Sequence by sequence, slot by slot, token by token. scale: None, not normalised.

    A token whose logits are not finite is left out of the slots and gets NaN.
    """
    slots_per_expert = phi.shape[1] // len(kernels[0])
    outputs = []
    for i, sequence in enumerate(x):
        kept = [t for t in range(len(sequence)) if mask is None or mask[i, t]]
        logits = {t: logits_of(sequence[t], phi, scale) for t in kept}
        whole = [t for t in kept if np.isfinite(logits[t]).all()]
        worked = []
        for j in range(phi.shape[1]):
            slot = np.zeros(x.shape[-1])
            if whole:
                shares = oracles.softmax_row([logits[t][j] for t in whole])
                for t, share in zip(whole, shares, strict=True):
                    slot += share * sequence[t]
            k = j // slots_per_expert
            kernel, bias = [w[k] for w in kernels], [w[k] for w in biases]
            worked.append(
                oracles.mlp(slot[None], kernel, bias, oracles.relu, oracles.linear)[0]
            )
        found = np.zeros((len(sequence), kernels[-1].shape[-1]))
        for t in kept:
            found[t] = np.nan
            if t in whole:
                shares = oracles.softmax_row(logits[t])
                found[t] = sum(c * y for c, y in zip(shares, worked, strict=True))
        outputs.append(found)
    return np.stack(outputs)


def logits_of(token, phi, scale):
    if scale is None:
        return np.array([token @ column for column in phi.T])
    token = token / np.sqrt(sum(token**2))
    return np.array([scale * (token @ c) / np.sqrt(sum(c**2)) for c in phi.T])


def made(x, e=3, units=(6, 5), s=2, **kwargs):
    """A float64 layer with random weights, and these as the oracle takes them."""
    layer = SoftMoE(e, units, s, activation="relu", dtype="float64", **kwargs)
    layer.build(x.shape)
    rng = np.random.default_rng(1)
    variables = layer.trainable_variables
    values = [np.asarray(rng.normal(size=v.shape)) for v in variables]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    named = list(zip([v.name for v in variables], values, strict=True))
    phi, *rest = [v for name, v in named if name == "phi"]
    assert not rest
    scale = [v for name, v in named if name == "scale"]
    kernels = [v for name, v in named if name.startswith("kernel")]
    biases = [v for name, v in named if name.startswith("bias")]
    return layer, values, (phi, scale[0] if scale else None, kernels, biases)


def sequences(b=2, t=4, d=3, dtype="float64"):
    return np.random.default_rng(0).normal(size=(b, t, d)).astype(dtype)


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


MASK = np.array([[True, False, True, True], [False, True, True, False]])


class Masked(keras.layers.Layer):
    """A layer that is always called with one mask."""

    def __init__(self, layer, mask):
        super().__init__(dtype=layer.dtype_policy)
        self.layer, self.mask = layer, mask
        self.built = True

    def call(self, x):
        return self.layer(x, mask=self.mask)


class Logits(keras.layers.Layer):
    """The logits of a layer, computed inside a call under its policy."""

    def __init__(self, layer):
        super().__init__(dtype=layer.dtype_policy)
        self.layer = layer
        self.built = True

    def call(self, x):
        return self.layer._logits(x)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"s": 1}, None),
        ({"e": 1, "s": 1}, None),
        ({"e": 1, "s": 3, "units": 4}, None),
        ({"normalize": False}, None),
        ({"use_bias": False, "units": (5,)}, None),
        ({}, MASK),
        ({"normalize": False, "s": 1}, MASK),
    ],
)
def test_outputs_and_all_gradients_equal_the_oracle(options, mask):
    x = sequences()
    layer, values, weights = made(x, **options)
    layer = layer if mask is None else Masked(layer, mask)
    expected = oracle(x, *weights, mask=mask)
    np.testing.assert_allclose(array(layer(x)), expected, **ORACLE)

    cotangent = np.random.default_rng(2).normal(size=expected.shape)
    by_weight, by_input = backends.gradients(layer, [x], [cotangent])
    wanted = oracles.numeric_gradients(
        lambda: (oracle(x, *weights, mask=mask) * cotangent).sum(), [*values, x]
    )
    for found, gradient in zip([*by_weight, *by_input], wanted, strict=True):
        np.testing.assert_allclose(found, gradient, **GRADIENTS)


@not_on_jax
@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 3),
    t=st.integers(1, 4),
    e=st.integers(1, 4),
    s=st.integers(1, 3),
    units=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    normalize=st.booleans(),
    data=st.data(),
)
def test_any_sizes_and_masks_equal_the_oracle(b, t, e, s, units, normalize, data):
    x = sequences(b, t, 2)
    mask = data.draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))
    mask = np.reshape(mask, (b, t))
    layer, _, weights = made(x, e, units, s, normalize=normalize)
    np.testing.assert_allclose(
        array(layer(x, mask=mask)), oracle(x, *weights, mask=mask), **ORACLE
    )


def test_by_hand():
    """Two tokens, one expert a slot; logits log 3 and 0 for the first, 0 for the other.

    D: slot 0 has 3/4 of the first token and 1/4 of the second, slot 1 halves. The
    tokens are 4 and 8, so the slots are 5 and 6. The experts give 2 * 5 and 10 * 6.
    C: the first token takes 3/4 and 1/4 of 10 and 60, the second one halves.
    """
    layer = SoftMoE(2, 1, use_bias=False, normalize=False, dtype="float64")
    x = np.array([[[4.0, 1.0], [8.0, 0.0]]])
    layer.build(x.shape)
    layer.phi.assign([[0.0, 0.0], [math.log(3), 0.0]])
    layer.experts.kernels[0].assign([[[2.0], [0.0]], [[10.0], [0.0]]])
    found = array(layer(x))[0, :, 0]
    np.testing.assert_allclose(found, [0.75 * 10 + 0.25 * 60, 35], rtol=1e-6)


def test_the_scale_sharpens_what_is_of_length_1():
    """Tokens of any length have the same logits; a large scale picks the nearest."""
    layer, _, _ = made(sequences())
    logits = array(layer._logits(ops.convert_to_tensor(sequences())))
    longer = array(layer._logits(ops.convert_to_tensor(7 * sequences())))
    np.testing.assert_allclose(longer, logits, **ORACLE)
    assert np.abs(logits).max() <= abs(float(array(layer.scale))) + 1e-6


def test_one_expert_with_one_slot_sees_the_weighted_mean():
    """C is 1 then, and every token gets the same."""
    x = sequences()
    layer, _, _ = made(x, e=1, s=1)
    found = array(layer(x))
    np.testing.assert_allclose(found, found[:, :1].repeat(4, axis=1), **ORACLE)


def test_sequences_of_a_batch_are_never_mixed():
    x = sequences(3)
    layer, _, _ = made(x)
    alone = np.concatenate([array(layer(row[None])) for row in x])
    np.testing.assert_allclose(array(layer(x)), alone, **ORACLE)


def test_more_leading_axes():
    x = sequences(6).reshape(2, 3, 4, 3)
    layer, _, weights = made(x)
    mask = np.random.default_rng(3).random((2, 3, 4)) < 0.6
    flat = oracle(x.reshape(6, 4, 3), *weights, mask=mask.reshape(6, 4))
    found = array(layer(x, mask=mask))
    assert found.shape == (2, 3, 4, 5) == layer.compute_output_shape(x.shape)
    np.testing.assert_allclose(found, flat.reshape(2, 3, 4, 5), **ORACLE)


# Padding, and tokens that are not finite


def test_padding_is_as_if_it_were_not_there():
    x = sequences()
    layer, _, _ = made(x)
    found = array(layer(np.where(MASK[..., None], x, np.nan), mask=MASK))
    assert (found[~MASK] == 0).all()
    for row, mask, outputs in zip(x, MASK, found, strict=True):
        alone = array(layer(row[mask][None]))[0]
        np.testing.assert_allclose(outputs[mask], alone, **ORACLE)


def test_nothing_but_padding_gives_zeros_and_finite_gradients():
    x = sequences()
    x[0] = np.nan
    mask = np.array([[False] * 4, [True] * 4])
    layer, _, _ = made(x)
    layer = Masked(layer, mask)
    found = array(layer(x))
    assert (found[0] == 0).all()
    assert np.isfinite(found).all()
    by_weight, by_input = backends.gradients(layer, [x], [np.ones(found.shape)])
    assert all(np.isfinite(gradient).all() for gradient in by_weight)
    assert (by_input[0][0] == 0).all()
    assert np.isfinite(by_input[0]).all()
    nobody = array(layer.layer(x, mask=np.zeros((2, 4), bool)))
    assert (nobody == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_breaks_only_its_own_output(normalize, broken):
    x = sequences().astype("float32")
    layer = SoftMoE(3, 5, 2, normalize=normalize)
    layer.build(x.shape)
    mask = np.ones((2, 4), bool)
    mask[0, 1] = mask[1, 2] = False
    expected = array(layer(x, mask=mask))
    x[0, 1, 0] = x[1, 2] = broken
    for run in (layer, *backends.compiled_calls(layer).values()):
        found = array(run(ops.convert_to_tensor(x)))
        assert np.isnan(found[~mask]).all()
        np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-5, atol=1e-6)


def test_a_token_of_zeros_is_a_token():
    """It has no direction: its logits are 0, and every gradient is finite."""
    x = sequences()
    x[0, 1] = 0
    layer, _, _ = made(x)
    logits = array(layer._logits(ops.convert_to_tensor(x)))
    assert (logits[0, 1] == 0).all()
    outputs = array(layer(x))
    assert np.isfinite(outputs).all()
    by_weight, by_input = backends.gradients(layer, [x], [np.ones(outputs.shape)])
    assert all(np.isfinite(g).all() for g in [*by_weight, *by_input])


# In a model


@pytest.mark.parametrize("s", [1, 2])
def test_compiled_equals_eager(s):
    x, mask = sequences(dtype="float32"), ops.convert_to_tensor(MASK)
    layer = SoftMoE(3, (6, 5), s)
    expected = array(layer(x))
    masked = Masked(layer, mask)
    expected_masked = array(masked(x))
    for run in backends.compiled_calls(layer).values():
        np.testing.assert_allclose(
            array(run(ops.convert_to_tensor(x))), expected, rtol=1e-5, atol=1e-6
        )
    for run in backends.compiled_calls(masked).values():
        np.testing.assert_allclose(
            array(run(ops.convert_to_tensor(x))), expected_masked, rtol=1e-5, atol=1e-6
        )


def test_any_batch_and_any_length():
    layer = SoftMoE(3, (6, 5), 2)
    inputs = keras.Input((None, 3))
    outputs = layer(inputs)
    assert outputs.shape == (None, None, 5)
    model = keras.Model(inputs, outputs)
    for b, t in [(1, 1), (3, 2), (2, 7)]:
        x = sequences(b, t, dtype="float32")
        np.testing.assert_allclose(
            model.predict_on_batch(x), array(layer(x)), rtol=1e-5, atol=1e-6
        )
    for shape in [(0, 4, 3), (2, 0, 3), (0, 0, 3)]:
        assert array(layer(np.zeros(shape, "float32"))).shape == (*shape[:2], 5)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        signature = [
            tf.TensorSpec([None, None, 3], "float32"),
            tf.TensorSpec([None, None], "bool"),
        ]
        for jit in (False, True):
            call = tf.function(
                lambda x, mask: layer(x, mask=mask), signature, jit_compile=jit
            )
            for b, t in [(2, 4), (0, 4), (2, 0)]:
                x, mask = sequences(b, t, dtype="float32"), MASK[:b, :t]
                np.testing.assert_allclose(
                    array(call(x, mask)), array(layer(x, mask=mask)), atol=1e-6
                )


def test_the_mask_of_an_embedding_is_used_and_passed_on():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    layer = SoftMoE(3, (6, 5))
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(4, 3, mask_zero=True)(inputs)
    model = keras.Model(inputs, [embedded, layer(embedded)])
    vectors, found = model(tokens)
    expected = layer(array(vectors), mask=tokens > 0)
    np.testing.assert_allclose(array(found), array(expected), rtol=1e-5, atol=1e-6)
    assert (array(found)[tokens == 0] == 0).all()
    mask = ops.convert_to_tensor(tokens > 0)
    assert layer.compute_mask(vectors, mask) is mask
    assert layer.compute_mask(vectors, None) is None


@pytest.mark.parametrize("jit", [pytest.param(False, marks=not_on_jax), True])
def test_it_trains(jit):
    if jit and keras.backend.backend() == "torch":
        pytest.skip("this backend is not compiled here")
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            SoftMoE(4, (16, 8), 2, dropout=0.1, seed=1),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit)
    x = sequences(64, dtype="float32")
    y = x.max(axis=1)[:, :1]
    history = model.fit(x, y, epochs=15, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("kind", ["mlp", "glu", "layers"])
def test_experts_of_every_kind(kind, tmp_path):
    experts = {
        "mlp": lambda: MLPExperts(3, (6, 5), "relu"),
        "glu": lambda: GLUExperts(3, 4, 5),
        "layers": lambda: LayerExperts([keras.layers.Dense(5) for _ in range(3)]),
    }[kind]()
    x = sequences(dtype="float32")
    layer = SoftMoE(3, slots_per_expert=2, experts=experts)
    expected = array(layer(x))
    # One slot at a time: an expert is a layer that maps any rows, here slot j.
    logits = array(layer._logits(ops.convert_to_tensor(x)))
    d = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    c = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    worked = array(experts(np.swapaxes(d, 1, 2) @ x))  # (b, m, e, u)
    own = np.stack([worked[:, j, j // 2] for j in range(6)], axis=1)
    np.testing.assert_allclose(expected, c @ own, rtol=1e-4, atol=1e-5)
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(array(loaded(x)), expected, rtol=1e-5, atol=1e-6)


def test_every_argument_is_in_the_config():
    given = {
        "num_experts": 3,
        "expert_units": (6, 5),
        "slots_per_expert": 2,
        "activation": "relu",
        "normalize": False,
        "phi_initializer": "ones",
        "use_bias": False,
        "dropout": 0.2,
        "kernel_initializer": "he_normal",
        "kernel_regularizer": "l2",
        "seed": 4,
    }
    layer = SoftMoE(**given, name="given")
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(again) == config
    assert config["registered_name"] == "keras_moe>SoftMoE"
    for name in ("slots_per_expert", "normalize", "use_bias", "dropout", "seed"):
        assert getattr(again, name) == given[name]
    assert again.experts.activation is keras.activations.relu
    assert again.experts.dropout == 0.2
    assert again.experts.use_bias is False


def test_the_mixtures_are_computed_in_float32_under_any_policy():
    x = sequences(t=300, dtype="float32")
    reference = SoftMoE(3, (6, 5), 2, dtype="float32")
    reference.build(x.shape)
    reference.scale.assign(0.7123)
    for policy in ("mixed_bfloat16", "mixed_float16"):
        layer = SoftMoE(3, (6, 5), 2, dtype=policy)
        layer.build(x.shape)
        layer.set_weights(reference.get_weights())
        rounded = ops.cast(ops.cast(x, layer.compute_dtype), "float32")
        expected, found = array(reference(rounded)), layer(x)
        assert keras.backend.standardize_dtype(found.dtype) == layer.compute_dtype
        found = array(ops.cast(found, "float32"))
        np.testing.assert_allclose(found, expected, atol=0.002)
        # Neither phi nor the scale may lose its low bits in the call of a layer.
        logits = Logits(layer)(x)
        assert keras.backend.standardize_dtype(logits.dtype) == "float32"
        np.testing.assert_allclose(
            array(logits), array(Logits(reference)(rounded)), rtol=1e-5, atol=1e-6
        )


def test_phi_is_not_the_kernel_of_an_expert():
    initializer = keras.initializers.LecunNormal(seed=1)
    layer = SoftMoE(
        1, 4, 4, phi_initializer=initializer, kernel_initializer=initializer
    )
    layer.build((None, None, 3))
    assert (array(layer.phi) != array(layer.experts.kernels[0])[0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "`num_experts`.*0"),
        ({"slots_per_expert": 0}, "`slots_per_expert`.*0"),
        ({"expert_units": None}, "`expert_units` must be given"),
        ({"expert_units": 0}, r"`expert_units\[0\]`.*0"),
        ({"dropout": 1.0}, "`dropout`.*1.0"),
        ({"experts": MLPExperts(2, 5)}, "`expert_units` must be None.*5"),
        (
            {"expert_units": None, "experts": MLPExperts(4, 5)},
            "`num_experts`.*num_experts=2, experts.num_experts=4",
        ),
        (
            {"expert_units": None, "experts": keras.layers.Dense(5)},
            "`experts` must be a layer of keras_moe.experts",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoftMoE(**{"num_experts": 2, "expert_units": 5, **arguments})


def test_examples_of_a_batch_are_no_sequence():
    reason = r"rank >= 3.*tokens, features.*not the examples of a batch.*\(4, 3\)"
    with pytest.raises(ValueError, match=reason):
        SoftMoE(2, 5)(np.ones((4, 3)))
    with pytest.raises(ValueError, match="rank >= 3"):
        SoftMoE(2, 5)(keras.Input((3,)))
    with pytest.raises(ValueError, match=reason):
        SoftMoE(2, 5).build((4, 3))
    layer = SoftMoE(2, 5)
    layer(np.ones((2, 4, 3)))
    with pytest.raises(ValueError, match="rank >= 3"):
        layer(np.ones((4, 3)))
    with pytest.raises(ValueError, match="axis -1"):
        layer(np.ones((2, 4, 6)))
