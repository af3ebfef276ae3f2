"""What experts stand for, against plain loops over users and ratings."""

from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.movielens.experts import gate_weights
from recsys_examples.movielens.model import TASKS, build_ranker
from recsys_examples.movielens.profiles import (
    LEAST_SHARE,
    Lifts,
    lifts,
    profile_experts,
    user_groups,
)
from tests.recsys_examples.conftest import NEWCOMER


def test_lifts_by_hand():
    weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    shares = np.array([[0.6, 0.0], [0.2, 0.0]])
    found = lifts(weights, shares)
    # Means 0.4. (1 * 0.6 + 0.5 * 0.2) / 1.5 = 0.7 / 1.5; the second has one user: 0.2.
    np.testing.assert_allclose(found[0], [0.7 / 1.5 / 0.4, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found[1], [0.2 / 0.4, 1.0], rtol=1e-6)
    assert found[2].tolist() == [1.0, 1.0]  # no weight


def test_what_stands_out():
    found = Lifts(("War", "Drama", "Comedy"), np.array([[1.2, 1.04, 1.6], [0.5, 1, 1]]))
    assert [name for name, _ in found.top(0)] == ["Comedy", "War"]
    assert found.top(0, most=1) == [("Comedy", 1.6)]
    assert found.top(1) == []


@pytest.mark.parametrize("body", ["mmoe", "moe"])
def test_profile(windows, settings, body):
    catalogue, sequences = windows.catalogue, windows.before_test
    popularity = np.bincount(sequences.movies, minlength=len(catalogue))
    settings = replace(settings, body=body, num_experts=3)
    ranker = build_ranker(catalogue, sequences.user_ids, popularity, settings)
    # Random gates of small logits would weight all users alike.
    for weight in ranker.body.weights:
        if "gate" in weight.path or "router" in weight.path:
            weight.assign(40 * weight.value)
    profile = profile_experts(ranker, sequences, catalogue)
    assert profile.tasks == TASKS
    assert profile.num_experts == 3

    total = np.zeros((len(TASKS), 3))
    weighted = {"genre": {}, "decade": {}}
    means = {"genre": {}, "decade": {}}
    counts = {"genre": {}, "decade": {}}
    by_user = []
    num_users = len(sequences.user_ids)
    for user in range(num_users):
        rows = ranker.user(sequences.histories(catalogue, np.array([user])))
        gates = np.asarray(gate_weights(ranker.body, rows, len(TASKS)))[0]
        total += gates
        by_user.append(gates.mean(0))
        rated = sequences.movies[sequences.starts[user] : sequences.starts[user + 1]]
        for movie in rated:
            names = {"genre": [g for g in catalogue.genres[movie] if g], "decade": []}
            if catalogue.years[movie]:
                names["decade"] = [f"{str(catalogue.years[movie])[:3]}0s"]
            for kind, found in names.items():
                for name in found:
                    share = 1 / len(rated)
                    weighted[kind][name] = (
                        weighted[kind].get(name, 0) + by_user[-1] * share
                    )
                    means[kind][name] = means[kind].get(name, 0) + share / num_users
                    counts[kind][name] = counts[kind].get(name, 0) + 1
    np.testing.assert_allclose(profile.weights, total / num_users, rtol=1e-5)
    for kind in ("genre", "decade"):
        found = getattr(profile, kind)
        common = LEAST_SHARE * len(sequences.movies)
        assert set(found.names) == {n for n, c in counts[kind].items() if c >= common}
        assert list(found.names) == sorted(found.names)
        for c, name in enumerate(found.names):
            expected = weighted[kind][name] / np.sum(by_user, axis=0)
            np.testing.assert_allclose(
                found.values[:, c], expected / means[kind][name], rtol=1e-4
            )
        assert np.ptp(found.values) > 0.05
    for c, (name, members) in enumerate(
        user_groups(sequences, np.arange(num_users)).items()
    ):
        own = np.array(by_user)[members].sum(0) / np.sum(by_user, axis=0)
        assert profile.user.names[c] == name
        np.testing.assert_allclose(
            profile.user.values[:, c], own / members.mean(), rtol=1e-4
        )


def test_groups_are_thirds_of_the_users(windows):
    sequences = windows.before_test
    users = np.arange(len(sequences.user_ids))
    groups = user_groups(sequences, users)
    assert len(groups) == 6
    for members in groups.values():
        assert 0.25 < members.mean() < 0.5
    row = np.searchsorted(sequences.user_ids, NEWCOMER)
    assert groups["few ratings"][row]
    stars = [
        sequences.ratings[sequences.starts[u] : sequences.starts[u + 1]].mean()
        for u in users
    ]
    assert groups["high stars"][np.argmax(stars)]
    assert groups["low stars"][np.argmin(stars)]
    last = sequences.timestamps[sequences.starts[1:] - 1]
    assert groups["seen lately"][np.argmax(last)]
    assert groups["seen long ago"][np.argmin(last)]


def test_a_shared_bottom_has_no_expert(windows, settings):
    catalogue, sequences = windows.catalogue, windows.before_test
    ranker = build_ranker(
        catalogue,
        sequences.user_ids,
        np.ones(len(catalogue)),
        replace(settings, body="shared_bottom"),
    )
    assert profile_experts(ranker, sequences, catalogue).num_experts == 0
