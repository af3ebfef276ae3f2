"""NoisyTopKRouter: its noise, choice probabilities and kernels."""

import keras
import numpy as np
import pytest

from keras_moe import routing
from tests.support.router_cases import array, arrays, make, on_logits, tokens


def test_the_noise_is_in_training_only():
    router = on_logits(make("noisy_top_k"))
    x = tokens(7, 4)
    still = arrays(router(x))
    assert set(still) == {*routing.Routing._fields} - {"mask"}
    chosen = np.eye(4)[still["expert_indices"]].sum(axis=1)
    np.testing.assert_array_equal(still["choice_probs"], chosen)
    expected = arrays(on_logits(make("top_k"))(x))
    for field, values in expected.items():
        np.testing.assert_allclose(still[field], values, rtol=1e-6)
    assert (array(router(x, training=True).router_logits) != x).all()


def test_choice_probs_are_frequencies():
    """Draw the noise of one expert anew 20,000 times and see how often it is chosen."""
    router = on_logits(make("noisy_top_k", dtype="float64", seed=5))
    clean = np.array([[0.3, -0.2, 0.5, 0.0]])
    record = arrays(router(clean, training=True))
    noisy = record["router_logits"][0]
    rng = np.random.default_rng(0)
    for e in range(4):
        redrawn = np.tile(noisy, (20_000, 1))
        # A noise kernel of zeros: the deviation is softplus(0) = log 2.
        redrawn[:, e] = clean[0, e] + np.log(2) * rng.normal(size=20_000)
        chosen = (np.argsort(-redrawn, axis=1)[:, :2] == e).any(axis=1)
        # Four standard errors of a frequency, at most 4 sqrt(0.25 / 20000) = 0.014.
        assert chosen.mean() == pytest.approx(record["choice_probs"][0, e], abs=0.015)


def test_all_experts_are_chosen_with_certainty():
    record = on_logits(make("noisy_top_k", top_k=4))(tokens(3, 4), training=True)
    assert (array(record.choice_probs) == 1).all()


def test_kernels_of_one_seeded_initializer_differ():
    initializer = keras.initializers.GlorotUniform(seed=1)
    router = make(
        "noisy_top_k",
        kernel_initializer=initializer,
        noise_kernel_initializer=initializer,
    )
    router.build((None, 5))
    assert (array(router.kernel) != array(router.noise_kernel)).all()
    assert (array(on_logits(make("noisy_top_k")).noise_kernel) == 0).all()
