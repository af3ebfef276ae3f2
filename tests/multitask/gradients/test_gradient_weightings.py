"""Gradient weightings: the rules for all, and each against its oracle."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.multitask import gradients
from keras_moe.multitask.gradients import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    GradientWeighting,
    NashMTL,
    PCGrad,
    UPGrad,
)
from keras_moe.multitask.weighting import GradNorm
from tests.support import backends
from tests.support import weighting_oracles as oracles
from tests.support.checks import array

METHODS = [AlignedMTL, CAGrad, GradNorm, IMTLG, MGDA, NashMTL, PCGrad, UPGrad]
all_methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


def random_gradients(t, kind, seed):
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(t, 12))
    if kind == "conflicting":
        found = 0.3 * found + np.linspace(-1, 1.1, t)[:, None] * rng.normal(size=12)
    elif kind == "scaled":
        found = found * 10.0 ** rng.uniform(-1.5, 1.5, size=(t, 1))
    elif kind == "similar":
        found = found + 3 * rng.normal(size=12)
    return found


PROBLEMS = [
    random_gradients(t, kind, seed)
    for seed, (t, kind) in enumerate(
        (t, kind)
        for t in (2, 3, 6)
        for kind in ("random", "conflicting", "scaled", "similar")
    )
]
# Compiled for each t on JAX.
FEW = PROBLEMS[4:8]


def gramian(found):
    return (found @ found.T).astype("float32")


def weights(layer, found, **arguments):
    return array(layer(gramian(found), **arguments))


def assert_near(update, expected, found):
    """Within 1e-3 of the length of the update."""
    error = np.linalg.norm(update - expected)
    assert error < 1e-3 * np.linalg.norm(expected) + 1e-6 * np.abs(found).max()


ORACLES = {
    AlignedMTL: oracles.aligned_mtl,
    CAGrad: lambda found: oracles.cagrad(found, 0.5),
    IMTLG: oracles.imtl_g,
    MGDA: oracles.mgda,
    NashMTL: lambda found: oracles.nash_mtl(found) @ found,
    PCGrad: lambda found: oracles.pcgrad(found, [range(len(found))] * len(found)),
    UPGrad: oracles.upgrad,
}


@pytest.mark.parametrize("method", ORACLES, ids=lambda m: m.__name__)
def test_the_update_is_that_of_the_oracle(method):
    problems = FEW if keras.backend.backend() == "jax" else PROBLEMS
    for found in problems:
        assert_near(weights(method(), found) @ found, ORACLES[method](found), found)


@all_methods
def test_a_task_outside_the_mask_has_no_influence(method):
    found = random_gradients(3, "conflicting", 1)
    alone = weights(method(), found)
    inner = gramian(found)
    full = np.full((4, 4), np.nan, "float32")
    kept = [0, 2, 3]
    full[np.ix_(kept, kept)] = inner
    mask = np.array([True, False, True, True])
    seen = array(method()(full, mask=mask))
    assert seen[1] == 0.0
    np.testing.assert_allclose(seen[kept], alone, rtol=1e-4, atol=1e-6)


@all_methods
def test_one_task_and_none(method):
    layer = method()
    found = gramian(random_gradients(3, "random", 0))
    seen = array(layer(found, mask=np.array([False, True, False])))
    np.testing.assert_array_equal(seen, [0.0, 1.0, 0.0])
    seen = array(layer(found, mask=np.zeros(3, bool)))
    np.testing.assert_array_equal(seen, np.zeros(3))
    np.testing.assert_array_equal(array(method()(np.array([[4.0]]))), [1.0])


@all_methods
def test_zero_gradients_and_gramians_that_are_not_finite(method):
    layer = method()
    found = random_gradients(3, "conflicting", 2)
    found[1] = 0.0
    assert np.isfinite(weights(layer, found)).all()
    assert np.isfinite(weights(layer, 0 * found)).all()
    for bad in (np.nan, np.inf):
        broken = gramian(found)
        broken[0, 2] = bad
        assert np.isnan(array(layer(broken))).all()
        mask = np.array([True, True, False])
        assert np.isfinite(array(layer(broken, mask=mask))).all()


@pytest.mark.parametrize("method", [IMTLG, PCGrad, UPGrad])
def test_a_zero_gradient_has_no_influence(method):
    found = random_gradients(3, "conflicting", 2)
    alone = weights(method(), found)
    seen = weights(method(), np.insert(found, 1, 0.0, axis=0))
    share = 3 / 4 if method is UPGrad else 1.0  # A mean over one task more.
    np.testing.assert_allclose(seen[[0, 2, 3]], share * alone, rtol=1e-4, atol=1e-5)


@all_methods
def test_the_scale_of_all_gradients_has_no_effect(method):
    found = random_gradients(3, "conflicting", 3)
    expected = weights(method(), found)
    for scale in (1e-15, 1e15):
        np.testing.assert_allclose(
            weights(method(), found * scale), expected, rtol=1e-3, atol=1e-5
        )


@all_methods
def test_equal_gradients_and_opposite_ones_are_finite(method):
    """The Gramian is singular."""
    for factors in ([1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, -2.0, 0.5]):
        found = np.outer(factors, np.ones(4))
        seen = weights(method(), found)
        assert np.isfinite(seen).all()
        # The update is a sum of at most that length.
        assert np.linalg.norm(seen @ found) <= 3.1 * np.abs(found).sum()


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        (AlignedMTL(), 1.0),
        (CAGrad(0.4), 1.4 / 4),
        (GradNorm(), 1.0),
        (IMTLG(), 1 / 4),
        (MGDA(), 1 / 4),
        (NashMTL(), 1.0),
        (PCGrad(), 1.0),
        (UPGrad(), 1 / 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_orthogonal_gradients_of_equal_norm(layer, weight):
    seen = array(layer(9 * np.eye(4)))
    np.testing.assert_allclose(seen, [weight] * 4, rtol=1e-4)


def test_mgda_of_two_vectors_by_hand():
    """(1, 0), (1, 2): w (1, 0) + (1 - w) (1, 2) is shortest at w = 1.

    (2, 0), (0, 1): |w g1 + (1 - w) g2|^2 = 4 w^2 + (1 - w)^2; w = 1/5.
    """
    found = np.array([[1.0, 0.0], [1.0, 2.0]])
    np.testing.assert_allclose(weights(MGDA(), found), [1, 0], atol=1e-5)
    found = np.diag([2.0, 1.0])
    np.testing.assert_allclose(weights(MGDA(), found), [0.2, 0.8], rtol=1e-4)


def test_orthogonal_gradients_have_inverse_norms_in_nash_mtl_and_imtl_g():
    """Norms 1, 2, 4: root mean square sqrt(7), so Nash's weights are sqrt(7) / norm."""
    found = np.diag([1.0, 2.0, 4.0])
    inverse = np.array([1.0, 0.5, 0.25])
    np.testing.assert_allclose(
        weights(NashMTL(), found), np.sqrt(7) * inverse, rtol=1e-3
    )
    np.testing.assert_allclose(
        weights(IMTLG(), found), inverse / inverse.sum(), rtol=1e-4
    )


def test_what_each_method_promises():
    for found in FEW:
        norms = np.linalg.norm(found, axis=1)
        seen = weights(IMTLG(), found) @ found @ found.T / norms
        np.testing.assert_allclose(seen, seen.mean(), rtol=2e-3, atol=1e-5)
        for method in (UPGrad, MGDA):
            update = weights(method(), found) @ found
            assert (found @ update / norms).min() > -1e-4 * np.linalg.norm(update)
        mean = found.mean(axis=0)
        update = weights(CAGrad(0.3), found) @ found
        radius = 0.3 * np.linalg.norm(mean)
        assert np.linalg.norm(update - mean) < radius * 1.001
        update = weights(CAGrad(0.0), found) @ found
        np.testing.assert_allclose(update, mean, rtol=1e-5)


def test_pcgrad_draws_an_order_for_every_task_and_step():
    found = random_gradients(5, "conflicting", 7)
    layer, twin = PCGrad(seed=3), PCGrad(seed=3)
    fixed = weights(layer, found)
    np.testing.assert_array_equal(weights(layer, found), fixed)
    seen = [weights(layer, found, training=True) for _ in range(8)]
    assert len({tuple(w) for w in seen}) > 2
    for w in seen:
        np.testing.assert_array_equal(weights(twin, found, training=True), w)
    # Every update is that of some order of each task.
    two = random_gradients(3, "conflicting", 8)
    possible = [
        oracles.pcgrad(two, [first, second, third])
        for first in ([1, 2], [2, 1])
        for second in ([0, 2], [2, 0])
        for third in ([0, 1], [1, 0])
    ]
    for _ in range(6):
        update = weights(PCGrad(), two, training=True) @ two
        assert min(np.abs(update - p).max() for p in possible) < 1e-5


def test_pcgrad_without_conflict_is_the_sum():
    found = np.abs(random_gradients(4, "random", 0))
    seen = weights(PCGrad(), found, training=True)
    np.testing.assert_array_equal(seen, np.ones(4))


def test_nash_mtl_keeps_its_weights_for_some_steps():
    layer = NashMTL(update_every=3)
    problems = [random_gradients(3, "random", seed) for seed in range(5)]
    solutions = [weights(NashMTL(), found) for found in problems]
    broken = problems[3] * np.nan
    seen = [weights(layer, found, training=True) for found in problems[:3]]
    for w in seen:
        np.testing.assert_allclose(w, solutions[0], rtol=1e-5)
    assert np.isnan(weights(layer, broken, training=True)).all()
    assert int(array(layer.steps)) == 0
    np.testing.assert_allclose(array(layer.last_weights), solutions[0], rtol=1e-5)
    # Outside of training: those of the Gramian, and no step.
    np.testing.assert_allclose(weights(layer, problems[4]), solutions[4], rtol=1e-5)
    mask = np.array([True, False, True])
    part = weights(NashMTL(), problems[4], mask=mask)
    seen = weights(layer, problems[4], mask=mask, training=True)
    np.testing.assert_allclose(seen, part, rtol=1e-5)
    seen = weights(layer, problems[3], training=True)
    expected = np.where(mask, part, solutions[0])
    np.testing.assert_allclose(seen, expected, rtol=1e-5)


@all_methods
def test_compiled_weights_are_those_of_eager_mode(method):
    found = random_gradients(3, "conflicting", 5)
    layer = method()
    expected = weights(layer, found)
    for run in backends.compiled_calls(layer).values():
        seen = array(run(ops.convert_to_tensor(gramian(found))))
        np.testing.assert_allclose(seen, expected, rtol=1e-3, atol=1e-5)


@all_methods
def test_config_dtype_and_shape(method):
    layer = method()
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is method
    assert again.get_config() == layer.get_config()
    assert layer.compute_output_shape((3, 3)) == (3,)
    found = random_gradients(3, "random", 4)
    half = method(dtype="mixed_float16")
    assert weights(half, found).dtype == "float32"
    double = method(dtype="float64")
    seen = array(double((found @ found.T).astype("float64")))
    assert seen.dtype == "float64"
    np.testing.assert_allclose(seen, weights(half, found), rtol=1e-3, atol=1e-5)


def test_get():
    assert gradients.get(None) is None
    for name, kind in gradients.KNOWN.items():
        assert type(gradients.get(name)) is kind
    layer = CAGrad(c=0.25)
    assert gradients.get(layer) is layer
    assert gradients.get(keras.saving.serialize_keras_object(layer)).c == 0.25
    for wrong in ("sum", 3, keras.layers.Dense(2)):
        with pytest.raises(ValueError, match=r"one of \['aligned_mtl', .*Received"):
            gradients.get(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAGrad(c=1.0), r"`c` must be in \[0, 1\)"),
        (lambda: NashMTL(update_every=0), "`update_every` must be an integer >= 1"),
        (lambda: PCGrad(seed="a"), "`seed` must be an integer or None"),
        (lambda: MGDA()(np.ones((2, 3))), r"`gramian` must have the shape \(t, t\)"),
        (lambda: MGDA()(np.ones((2, 2)), np.ones(3)), "`task_losses` must have the"),
        (lambda: MGDA()(np.ones((2, 2)), mask=np.ones(3, bool)), "`mask` must have"),
        (lambda: GradientWeighting()(np.eye(2)), "must implement `weights_of`"),
    ],
)
def test_invalid_arguments(make, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()
