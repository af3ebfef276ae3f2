"""What experts contribute, against models that never had the expert."""

from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.errors import InputError
from recsys_examples.movielens.experts import (
    Contributions,
    gate_weights,
    without_each,
)
from recsys_examples.movielens.model import TASKS, build_ranker
from recsys_examples.movielens.training import fit_ranker

EXPERTS = 3


def built(windows, settings):
    popularity = np.bincount(
        windows.before_test.movies, minlength=len(windows.catalogue)
    )
    return build_ranker(
        windows.catalogue, windows.before_test.user_ids, popularity, settings
    )


@pytest.fixture(scope="module")
def of_body(settings):
    return lambda body: replace(settings, body=body, num_experts=EXPERTS, max_epochs=4)


@pytest.fixture(scope="module")
def rankers(windows, of_body):
    """Trained rankers with three experts."""
    return {
        body: fit_ranker(
            windows.before_test, windows.catalogue, of_body(body), epochs=4, verbose=0
        ).ranker
        for body in ("mmoe", "moe")
    }


@pytest.fixture(scope="module")
def features(windows):
    users = np.arange(len(windows.before_test.user_ids))
    return windows.before_test.histories(windows.catalogue, users)


@pytest.fixture(scope="module")
def explained(rankers, features, windows):
    """Gate weights, contributions to all movies, and means, of each body."""
    size = len(windows.catalogue)
    movies = np.broadcast_to(np.arange(size), (len(features["user_id"]), size))
    return {
        body: [
            np.asarray(found)
            for found in Contributions(ranker)(
                features, movies, ranker.towers["watch"].movies.all_movies()[0]
            )
        ]
        for body, ranker in rankers.items()
    }


def scores(ranker, features):
    """(b, i, t)."""
    found = ranker.catalogue.predict(features, verbose=0)
    return np.stack([found[task] for task in TASKS], axis=-1)


def test_by_hand():
    gates = np.array([[[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]], "float32")
    outputs = np.array([[[1.0], [2.0], [4.0]]], "float32")
    found = np.asarray(without_each(gates, outputs))[0, :, :, 0]
    # (0.3 * 2 + 0.2 * 4) / 0.5, (0.5 * 1 + 0.2 * 4) / 0.7, (0.5 * 1 + 0.3 * 2) / 0.8
    np.testing.assert_allclose(found[0], [2.8, 1.3 / 0.7, 1.375], rtol=1e-6)
    # All weight is on the second expert: nothing is left without it.
    np.testing.assert_allclose(found[1], [2.0, 0.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("body", ["mmoe", "moe"])
def test_the_parts_make_the_body(rankers, features, body):
    ranker = rankers[body]
    rows = ranker.user(features, training=False)
    gates = gate_weights(ranker.body, rows, len(TASKS))
    outputs = ranker.body.experts(rows, training=False)
    mixed = np.asarray(gates) @ np.asarray(outputs)
    expected = ranker.body(rows)
    for t, task in enumerate(TASKS):
        whole = expected[task] if body == "mmoe" else expected
        np.testing.assert_allclose(mixed[:, t], np.asarray(whole), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def lost(rankers, features, windows, of_body):
    """(b, i, t, e): what the scores lose in models that have all experts but one.

    Their softmax over the other experts has the renormalized weights.
    """
    parts = []
    for expert in range(EXPERTS):
        without = built(windows, replace(of_body("mmoe"), num_experts=EXPERTS - 1))
        for new, old in zip(
            without.catalogue.weights, rankers["mmoe"].catalogue.weights, strict=True
        ):
            value = old.numpy()
            for axis in np.flatnonzero(np.array(new.shape) != value.shape):
                value = np.delete(value, expert, axis)
            new.assign(value)
        parts.append(scores(rankers["mmoe"], features) - scores(without, features))
    return np.stack(parts, axis=-1)


class TestSilenced:
    """The scores of a trained MMoE, against models that never had the expert."""

    def test_contributions(self, explained, lost):
        _, contributions, means = explained["mmoe"]
        assert (lost.std(axis=(0, 1)) > 0.003).all()
        np.testing.assert_allclose(contributions, lost, rtol=0, atol=2e-5)
        np.testing.assert_allclose(means, lost.mean(axis=1), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("expert", range(EXPERTS))
    def test_the_movies_it_is_said_to_carry_most_lose_most(
        self, explained, lost, expert
    ):
        """The tenth at the top against that at the bottom, and a control expert."""
        order = np.argsort(-explained["mmoe"][1][..., expert], axis=1)
        tenth = order.shape[1] // 10

        def gaps(silenced):
            """(b, t), in standard deviations over the movies."""
            own = lost[..., silenced]
            found = np.take_along_axis(own, order, axis=1)
            gap = found[:, :tenth].mean(1) - found[:, -tenth:].mean(1)
            return gap / own.std(axis=1)

        assert (gaps(expert) > 2).all()
        for control in {*range(EXPERTS)} - {expert}:
            assert gaps(control).mean() < 0.5 * gaps(expert).mean()


def test_a_sparse_mixture_in_numpy(rankers, explained, features):
    """Two of three experts a user: without one of them, the other has weight 1."""
    ranker = rankers["moe"]
    gates, contributions, _ = explained["moe"]
    rows = np.asarray(ranker.user(features, training=False))
    logits = rows @ np.asarray(ranker.body.router.kernel)
    kernel, bias = (np.asarray(w) for w in ranker.body.experts.weights)
    outputs = np.maximum(np.einsum("bd,edu->ebu", rows, kernel) + bias[:, None], 0)
    chosen = np.argsort(-logits, axis=1)[:, :2]
    pair = np.take_along_axis(logits, chosen, axis=1)
    weights = np.exp(pair) / np.exp(pair).sum(1, keepdims=True)
    for expert in range(EXPERTS):
        mixed, without = np.zeros((2, len(rows), outputs.shape[-1]))
        for b, two in enumerate(chosen):
            mixed[b] = weights[b] @ outputs[two, b]
            others = [e for e in two if e != expert]
            share = weights[b][[e != expert for e in two]]
            without[b] = share / share.sum() @ outputs[others, b]
        for t, task in enumerate(TASKS):
            np.testing.assert_allclose(
                gates[chosen[:, 0] == expert, t, expert],
                weights[chosen[:, 0] == expert, 0],
                rtol=0,
                atol=1e-5,
            )
            named = ranker.catalogue.get_layer
            change = mixed - without
            user = change @ np.asarray(named(f"user_{task}").kernel)
            vectors = np.asarray(ranker.towers[task].movies.all_movies()[0])
            level = change @ np.squeeze(
                next(w for w in named(f"level_{task}").get_weights() if w.ndim > 1)
            )
            lost = user @ vectors.T + level.reshape(-1, 1)
            np.testing.assert_allclose(
                contributions[:, :, t, expert], lost, rtol=0, atol=2e-5
            )


def test_a_shared_bottom(windows, settings):
    ranker = built(windows, replace(settings, body="shared_bottom"))
    with pytest.raises(InputError, match=r"shared_bottom.* has no experts"):
        Contributions(ranker)
