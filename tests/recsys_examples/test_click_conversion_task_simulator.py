"""Simulated tasks: weights by hand, shares of labels, scenarios."""

from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.click_conversion.task_simulator import (
    Tasks,
    sample_tasks,
    simulate_tasks,
    weights,
)

SMALL = Tasks(rows=20_000, features=40)


def gram(settings, seed=0):
    w = weights(settings, np.random.default_rng(seed))
    assert w.shape == (settings.scenarios, settings.tasks, settings.features)
    flat = w.reshape(-1, settings.features)
    return flat @ flat.T


class TestWeights:
    @pytest.mark.parametrize(
        ("tasks", "p"), [(2, -1.0), (2, 0.0), (2, 0.7), (2, 1.0), (3, -0.5), (5, 0.4)]
    )
    def test_correlation(self, tasks, p):
        expected = np.full((tasks, tasks), p)
        np.fill_diagonal(expected, 1)
        settings = replace(SMALL, tasks=tasks, correlation=p)
        np.testing.assert_allclose(gram(settings), expected, atol=1e-7)

    def test_scenarios(self):
        settings = replace(
            SMALL, correlation=-0.5, scenarios=3, scenario_difference=0.6
        )
        # Within a scenario: p = -0.5. A task in two scenarios: 1 - 0.36 = 0.64; two
        # tasks in two scenarios: -0.5 * 0.64 = -0.32.
        across = np.where(np.eye(3), 1, 0.64)
        expected = np.kron(across, [[1, -0.5], [-0.5, 1]])
        np.testing.assert_allclose(gram(settings), expected, atol=1e-7)

    def test_equal_scenarios(self):
        settings = replace(SMALL, correlation=0.5, scenarios=4, features=2)
        np.testing.assert_allclose(gram(settings)[::2, ::2], 1, atol=1e-7)

    def test_the_base_does_not_depend_on_the_scenarios(self):
        one = weights(SMALL, np.random.default_rng(0))
        many = replace(SMALL, scenarios=2, scenario_difference=1e-9)
        np.testing.assert_allclose(
            weights(many, np.random.default_rng(0))[0], one[0], atol=1e-7
        )


class TestLabels:
    def test_rate(self):
        rows = sample_tasks(replace(SMALL, rate=0.2))
        for name in ("task_0", "task_1"):
            assert rows.truth[name].mean() == pytest.approx(0.2, abs=1e-6)
            # The standard error is 0.003.
            assert rows.labels[name].mean() == pytest.approx(0.2, abs=0.012)

    def test_linear_logits_have_the_correlation(self):
        rows = sample_tasks(replace(SMALL, sines=0, correlation=-0.6))
        logits = [np.log(p / (1 - p)) for p in rows.truth.values()]
        assert np.corrcoef(logits)[0, 1] == pytest.approx(-0.6, abs=0.03)
        assert np.std(logits[0]) == pytest.approx(2.0)

    def test_shares(self):
        # 0.5, 0.5 * 0.04^(1/2) = 0.1, 0.5 * 0.04 = 0.02
        settings = replace(SMALL, tasks=3, label_share=0.5, imbalance=0.04)
        np.testing.assert_allclose(settings.label_shares, [0.5, 0.1, 0.02])
        rows = sample_tasks(settings)
        found = [np.isfinite(label).mean() for label in rows.labels.values()]
        np.testing.assert_allclose(found, [0.5, 0.1, 0.02], atol=0.015)
        scarce = rows.labels["task_1"]
        known = np.isfinite(scarce)
        full = sample_tasks(replace(SMALL, tasks=3)).labels["task_1"]
        np.testing.assert_array_equal(scarce[known], full[known])

    def test_all_labels_by_default(self):
        for label in sample_tasks(SMALL).labels.values():
            assert np.isfinite(label).all()


class TestScenarios:
    def test_rows(self):
        data = simulate_tasks(replace(SMALL, scenarios=3, scenario_difference=0.5))
        assert data.scenarios == 3
        assert data.vocabulary == {"scenario": 4}
        part = data.train
        np.testing.assert_array_equal(part.features["scenario"], part.scenario + 1)
        counts = np.bincount(part.scenario)
        np.testing.assert_allclose(counts / len(part), 1 / 3, atol=0.02)

    def test_a_scenario_has_its_own_weights(self):
        settings = replace(SMALL, sines=0, scenarios=2, scenario_difference=1.0)
        rows = sample_tasks(settings)
        x = np.stack([rows.features[f"x{i}"] for i in range(40)], axis=1)
        logits = np.log(rows.truth["task_0"] / (1 - rows.truth["task_0"]))
        found = []
        for s in range(2):
            inside = rows.scenario == s
            w = np.linalg.lstsq(x[inside], logits[inside], rcond=None)[0]
            found.append(w / np.linalg.norm(w))
        assert found[0] @ found[1] == pytest.approx(0, abs=0.02)


def test_seeds():
    one, same, other = (simulate_tasks(SMALL, seed).fingerprint() for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rows": 2}, "rows must be at least 3; got 2"),
        ({"tasks": 1}, "tasks must be at least 2; got 1"),
        ({"sines": -1}, "sines must be at least 0; got -1"),
        ({"scenarios": 0}, "scenarios must be at least 1; got 0"),
        ({"scale": 0.0}, "scale must be > 0; got 0.0"),
        ({"signal": 0.0}, "signal must be > 0; got 0.0"),
        ({"label_share": 0.0}, r"label_share must be in \(0, 1\]; got 0.0"),
        ({"imbalance": 1.5}, r"imbalance must be in \(0, 1\]; got 1.5"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\); got 1.0"),
        ({"scenario_difference": 2.0}, r"must be in \[0, 1\]; got 2.0"),
        ({"tasks": 3, "correlation": -0.6}, r"with tasks=3; got -0.6"),
        (
            {"scenarios": 3, "scenario_difference": 0.5, "features": 7},
            "features must be at least 8 for 2 tasks and 3 scenarios; got 7",
        ),
    ],
)
def test_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Tasks(**setting)
