"""SinkhornRouter by hand, and the balance that it finds."""

import numpy as np

from tests.support.router_cases import array, arrays, make, on_logits, tokens


def test_sinkhorn_by_hand():
    """Both tokens want expert 0, the second one more so. One of them must go."""
    router = on_logits(make("sinkhorn", 2, top_k=1))
    x = np.array([[2.0, 1.0], [3.0, 0.0]])
    assert array(router(x).expert_indices).tolist() == [[0], [0]]
    found = arrays(router(x, training=True))
    assert found["expert_indices"].tolist() == [[1], [0]]
    # The weights are those of a plain softmax: 1 / (1 + e) and 1 / (1 + e^-3).
    np.testing.assert_allclose(
        found["combine_weights"], [[1 / (1 + np.e)], [1 / (1 + np.exp(-3))]], 1e-5
    )


def test_sinkhorn_balances_a_skewed_batch():
    x = tokens(512, 4) + np.array([3.0, 0, 0, -2.0])
    router = on_logits(make("sinkhorn", top_k=1, temperature=0.3))
    plain = np.bincount(array(router(x).expert_indices)[:, 0], minlength=4)
    balanced = array(router(x, training=True).expert_indices)[:, 0]
    assert plain.max() > 400
    assert np.bincount(balanced, minlength=4).max() < 1.15 * 512 / 4


def test_padding_and_nan_take_no_part_in_the_balance():
    x = np.array([[2.0, 1.0], [3.0, 0.0], [9.0, 0.0], [np.nan, 1.0]])
    router = on_logits(make("sinkhorn", 2, top_k=1))
    mask = np.array([True, True, False, True])
    found = array(router(x, mask=mask, training=True).expert_indices)
    assert found[:2].tolist() == [[1], [0]]
    nobody = router(x, mask=np.zeros(4, bool), training=True)
    assert set(array(nobody.expert_indices).ravel()) <= {0, 1}
