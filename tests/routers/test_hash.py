"""HashRouter: even, reproducible, and without weights."""

import numpy as np
import pytest

from keras_moe import routers
from tests.support.router_cases import MASK, array


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_vocabulary_is_divided_evenly(k):
    router = routers.HashRouter(4, k, vocabulary_size=103, seed=2)
    chosen = array(router(np.arange(103)).expert_indices)
    for choice in chosen.T:
        counts = np.bincount(choice, minlength=4)
        assert set(counts) <= {103 // 4, 103 // 4 + 1}
    assert all(len(set(row)) == k for row in chosen)
    again = routers.HashRouter(4, k, vocabulary_size=103, seed=2)
    assert (array(again(np.arange(103)).expert_indices) == chosen).all()
    other = routers.HashRouter(4, k, vocabulary_size=103, seed=3)
    assert (array(other(np.arange(103)).expert_indices) != chosen).any()


def test_ids_outside_the_vocabulary_are_taken_modulo_its_size():
    router = routers.HashRouter(4, 2, vocabulary_size=10)
    inside = array(router(np.array([3, 9, 0])).expert_indices)
    outside = array(router(np.array([13, -1, 10])).expert_indices)
    assert (inside == outside).all()
    large = routers.HashRouter(4, 1, vocabulary_size=1000)
    found = large(np.array([200], "uint8")).expert_indices
    assert array(found) == array(large(np.array([200])).expert_indices)


def test_hashes_never_change():
    """Numbers written down once: no backend, process or version may change them."""
    router = routers.HashRouter(7, 3, seed=1)
    ids = np.array([0, 1, 2, 3, 1_000_000, 2**31 - 1, -1, -(2**31)])
    first = [[0, 2, 5], [3, 4, 1], [4, 3, 6], [4, 3, 2]]
    far = [[0, 6, 1], [0, 1, 2], [0, 5, 3], [5, 2, 4]]
    assert array(router(ids).expert_indices).tolist() == first + far


@pytest.mark.parametrize("step", [1, 64, 65536])
def test_a_hash_is_even_and_its_choices_differ(step):
    ids = np.arange(-8000, 8000) * step
    chosen = array(routers.HashRouter(8, 2)(ids.astype("int32")).expert_indices)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    # 7 degrees of freedom: chi² is above 30 once in 10,000 hashes.
    for choice in chosen.T:
        counts = np.bincount(choice, minlength=8)
        assert ((counts - 2000) ** 2 / 2000).sum() < 30
    # All 56 ordered pairs, 286 times each on average.
    pairs = np.bincount(chosen[:, 0] * 8 + chosen[:, 1], minlength=64)
    assert pairs[pairs > 0].size == 56
    assert pairs[pairs > 0].min() > 200


def test_hash_weights_and_shapes():
    router = routers.HashRouter(4, 2)
    flat, column = router(np.arange(5)), router(np.arange(5)[:, None], mask=MASK[:5])
    assert (array(flat.expert_indices) == array(column.expert_indices)).all()
    assert (array(flat.combine_weights) == 0.5).all()
    assert (array(column.mask) == MASK[:5]).all()
    assert flat.router_logits is flat.router_probs is flat.choice_probs is None
    everything = array(routers.HashRouter(3, 3)(np.arange(9)).expert_indices)
    assert (np.sort(everything, axis=1) == [0, 1, 2]).all()


def test_a_hash_router_needs_ids():
    with pytest.raises(ValueError, match=r"`router_inputs`.*float32"):
        routers.HashRouter(4)(np.ones(3, "float32"))
    with pytest.raises(ValueError, match=r"\(n,\) or \(n, 1\).*\(3, 2\)"):
        routers.HashRouter(4)(np.ones((3, 2), "int32"))
