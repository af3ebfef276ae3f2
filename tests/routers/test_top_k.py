"""TopKRouter by hand, and its jitter."""

import numpy as np

from tests.support.router_cases import array, arrays, make, on_logits


def test_top_k_by_hand():
    x = np.log([[1.0, 4.0, 2.0, 3.0]])
    found = arrays(on_logits(make("top_k"))(x))
    assert found["expert_indices"].tolist() == [[1, 3]]
    np.testing.assert_allclose(found["router_probs"], [[0.1, 0.4, 0.2, 0.3]], 1e-6)
    np.testing.assert_allclose(found["combine_weights"], [[4 / 7, 3 / 7]], 1e-6)
    switch = arrays(on_logits(make("top_k", top_k=1))(x))
    np.testing.assert_allclose(switch["combine_weights"], [[0.4]], 1e-6)
    # sigmoid(log a) = a / (a + 1): 1/2, 4/5, 2/3, 3/4, together 163/60
    found = arrays(on_logits(make("top_k", score_function="sigmoid"))(x))
    np.testing.assert_allclose(found["combine_weights"], [[0.8 / 1.55, 0.75 / 1.55]])
    np.testing.assert_allclose(
        found["router_probs"], [[30 / 163, 48 / 163, 40 / 163, 45 / 163]], 1e-6
    )


def test_jitter_is_in_training_and_in_its_bounds():
    router = on_logits(make("top_k", jitter=0.1, seed=1))
    x = np.full((50, 4), 2.0)
    assert (array(router(x).router_logits) == 2.0).all()
    moved = array(router(x, training=True).router_logits)
    assert 1.8 <= moved.min() < 1.85
    assert 2.15 < moved.max() <= 2.2
    assert (moved != array(router(x, training=True).router_logits)).any()
