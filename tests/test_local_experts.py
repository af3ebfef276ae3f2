"""The errors of Jacobs et al. 1991: by hand, against an oracle, at the limits."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import losses
from tests.support import backends, local_experts_oracles, oracles

NAMES = ["local_experts_loss", "expected_squared_error", "mixture_squared_error"]
every_loss = pytest.mark.parametrize("name", NAMES)
RNG = np.random.default_rng(0)
TARGETS = RNG.normal(size=(5, 2))
OUTPUTS = RNG.normal(size=(5, 3, 2))
WEIGHTS = RNG.dirichlet(np.ones(3), size=5)
MASK = np.array([True, False, True, True, False])


class OfTensors(keras.layers.Layer):
    """A function as a layer, so that `backends.gradients` can take its gradients."""

    def __init__(self, function):
        super().__init__(dtype="float64")
        self.function = function
        self.built = True

    def call(self, targets, outputs, weights):
        return self.function(targets, outputs, weights)


def value(loss):
    array = ops.convert_to_numpy(loss)
    assert array.shape == ()
    return float(array)


def gradients(function, *arrays, dtype="float64"):
    layer = OfTensors(lambda *x: function(*[ops.cast(part, dtype) for part in x]))
    return backends.gradients(layer, list(arrays), [np.asarray(1.0, dtype)])[1]


def test_by_hand():
    # The target 2, the experts 0 and 4, the weights 1/4 and 3/4.
    case = np.array([[2.0]]), np.array([[[0.0], [4.0]]]), np.array([[0.25, 0.75]])
    # (2 - 3)²
    assert value(losses.mixture_squared_error(*case)) == pytest.approx(1)
    # 1/4 · 4 + 3/4 · 4
    assert value(losses.expected_squared_error(*case)) == pytest.approx(4)
    # -log(1/4 e^-2 + 3/4 e^-2) = 2
    assert value(losses.local_experts_loss(*case)) == pytest.approx(2)


def test_an_expert_that_is_right_is_enough():
    # Equation 1.3 with the weight 1/2 on an expert at the target, and one far away.
    case = np.array([[3.0]]), np.array([[[3.0], [-90.0]]]), np.array([[0.5, 0.5]])
    assert value(losses.local_experts_loss(*case)) == pytest.approx(math.log(2))
    _, by_outputs, by_weights = gradients(losses.local_experts_loss, *case)
    # The other expert is not drawn to the target; the gate moves to the right one.
    np.testing.assert_allclose(by_outputs, 0, atol=1e-12)
    np.testing.assert_allclose(by_weights, [[-2.0, 0.0]], atol=1e-12)
    # Equation 1.1 draws both: 2 (3 + 43.5) ... times half.
    _, by_outputs, _ = gradients(losses.mixture_squared_error, *case)
    np.testing.assert_allclose(by_outputs, [[[-46.5], [-46.5]]])


@every_loss
@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_the_oracle(name, masked):
    loss, oracle = getattr(losses, name), getattr(local_experts_oracles, name)
    mask = MASK if masked else None
    counted = MASK if masked else np.ones(5, bool)
    arrays = [TARGETS.copy(), OUTPUTS.copy(), WEIGHTS.copy()]
    found = value(loss(*arrays, mask))
    expected = oracle(*arrays, counted)
    assert found == pytest.approx(expected, **relative(1e-9))
    expected = oracles.numeric_gradients(lambda: oracle(*arrays, counted), arrays)
    found = gradients(lambda *x: loss(*x, mask), *arrays)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **backends.tolerance(1e-6, 1e-8))


def relative(rtol):
    tolerance = backends.tolerance(rtol)
    return {"rel": tolerance["rtol"], "abs": tolerance["atol"]}


@every_loss
def test_padding_counts_nowhere_whatever_it_holds(name):
    loss = getattr(losses, name)
    padded = [x.copy() for x in (TARGETS, OUTPUTS, WEIGHTS)]
    for array in padded:
        array[~MASK] = np.nan
    expected = value(loss(TARGETS, OUTPUTS, WEIGHTS, MASK))
    assert value(loss(*padded, MASK)) == pytest.approx(expected, rel=1e-9)
    for gradient in gradients(lambda *x: loss(*x, MASK), *padded):
        assert np.isfinite(gradient).all()
        assert (gradient[~MASK] == 0).all()
    assert value(loss(*padded, np.zeros(5, bool))) == 0
    assert value(loss(TARGETS, OUTPUTS, WEIGHTS, 2.0 * MASK)) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_experts_and_tiny_weights_stay_finite(dtype):
    # Every exp(-||d - o||² / 2) underflows; the loss is that of the nearest expert.
    targets, outputs = np.array([[0.0]]), np.array([[[100.0], [200.0], [1.0]]])
    weights = np.array([[1.0, 1e-30, 0.0]])
    found = value(
        losses.local_experts_loss(
            *[ops.cast(x, dtype) for x in (targets, outputs, weights)]
        )
    )
    assert found == pytest.approx(5000)  # The third expert has no weight.
    for gradient in gradients(
        losses.local_experts_loss, targets, outputs, weights, dtype=dtype
    ):
        assert np.isfinite(gradient).all()
    # A weight that float32 holds as a denormal counts as 0, with a gradient of 0.
    weights = np.array([[1.0, 1e-40, 0.0]])
    by_weights = gradients(
        losses.local_experts_loss, targets, outputs, weights, dtype=dtype
    )[2]
    np.testing.assert_allclose(by_weights, [[-1.0, 0.0, 0.0]], atol=1e-6)


@every_loss
def test_half_precision_is_computed_in_float32(name):
    arrays = [ops.cast(x, "bfloat16") for x in (TARGETS, OUTPUTS, WEIGHTS)]
    found = getattr(losses, name)(*arrays)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    exact = getattr(losses, name)(*[ops.cast(x, "float32") for x in arrays])
    assert value(found) == value(exact)


@every_loss
def test_types_may_differ(name):
    expected = value(getattr(losses, name)(TARGETS, OUTPUTS, WEIGHTS))
    mixed = getattr(losses, name)(
        TARGETS, OUTPUTS.astype("float32"), WEIGHTS.astype("float32")
    )
    assert keras.backend.standardize_dtype(mixed.dtype) == "float32"
    assert value(mixed) == pytest.approx(expected, rel=1e-5)


@every_loss
def test_no_examples_at_all(name):
    empty = np.zeros((0, 2)), np.zeros((0, 3, 2)), np.zeros((0, 3))
    assert value(getattr(losses, name)(*empty)) == 0
