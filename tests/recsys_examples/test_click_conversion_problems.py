"""What is learned: losses and metrics by hand, rows without a label."""

import math

import numpy as np
import pytest

from recsys_examples.click_conversion.data import Part
from recsys_examples.click_conversion.problems import (
    Chain,
    Goal,
    Separate,
    log_loss,
    total_loss,
)
from recsys_examples.click_conversion.settings import MODELS, NAIVE


def part(labels, truth=None, scenario=None):
    labels = {name: np.float32(values) for name, values in labels.items()}
    n = len(next(iter(labels.values())))
    return Part(
        {"x": np.zeros(n, np.float32)},
        labels,
        np.arange(n),
        np.zeros(n, np.int32) if scenario is None else np.int32(scenario),
        {name: np.float64(values) for name, values in (truth or {}).items()},
    )


def outputs(**values):
    return {name: np.float32(v)[:, None] for name, v in values.items()}


def measured(problem, rows, predicted):
    meters = problem.meters()
    problem.measure(meters, rows, predicted)
    return meters.results()


CLICKS = part({"click": [0, 1, 1, 0], "conversion": [np.nan, 1, 0, np.nan]})
PREDICTED = outputs(
    click=[0.2, 0.6, 0.5, 0.7],
    conversion=[0.9, 0.8, 0.3, 0.1],
    click_and_conversion=[0.18, 0.48, 0.15, 0.07],
)


class TestChain:
    def test_loss_is_the_likelihood_of_what_was_observed(self):
        # No click; click and conversion; click alone; no click.
        expected = -sum(map(math.log, [0.8, 0.6 * 0.8, 0.5 * 0.7, 0.3]))
        ((total, weight),) = Chain().losses(CLICKS, PREDICTED).values()
        assert total == pytest.approx(expected, rel=1e-6)
        assert weight == 4

    def test_metrics(self):
        found = measured(Chain(), CLICKS, PREDICTED)
        assert set(found) == set(Chain().metrics)
        # Clicks 0.6 and 0.5 against 0.2 and 0.7: two of four pairs in order.
        assert found["first_auc"] == pytest.approx(0.5)
        assert found["rate_auc"] == 1.0
        assert found["joint_auc"] == 1.0
        assert found["joint_pcoc"] == pytest.approx(0.88)
        # Two bins at most of clicked rows: |0.8 - 1| and |0.3 - 0|, half each.
        assert found["rate_ece"] == pytest.approx(0.25)

    def test_metrics_against_the_truth(self):
        truth = {
            "conversion_probability": [0.9, 0.4, 0.3, 0.1],
            "conversion_if_clicked": [1, 1, 0, 0],
        }
        rows = part(CLICKS.labels, truth)
        found = measured(Chain(known_truth=True), rows, PREDICTED)
        assert set(found) == set(Chain(known_truth=True).metrics)
        assert found["rate_auc_all"] == 1.0
        # Right but for the second row: 0.8 instead of 0.4.
        assert found["rate_ece_all"] == pytest.approx(0.1, abs=1e-6)
        assert found["rate_pcoc_all"] == pytest.approx(2.1 / 1.7)
        excess = 0.4 * math.log(0.4 / 0.8) + 0.6 * math.log(0.6 / 0.2)
        assert found["rate_excess_all"] == pytest.approx(excess / 4, rel=1e-5)

    def test_ranking_within_scenarios(self):
        rows = part(
            {"click": [1, 1, 1, 1], "conversion": [1, 0, 1, 0]}, scenario=[0, 0, 1, 1]
        )
        predicted = outputs(
            click=[0.9, 0.9, 0.9, 0.9],
            conversion=[0.2, 0.1, 0.8, 0.7],
            click_and_conversion=[0.2, 0.1, 0.8, 0.7],
        )
        found = measured(Chain(by_scenario=True), rows, predicted)
        # In order within both scenarios; 3 of 4 pairs of all rows.
        assert found["joint_gauc"] == 1.0
        assert found["joint_auc"] == 0.75

    def test_a_metric_without_both_classes_is_left_out(self):
        rows = part({"click": [0, 1], "conversion": [np.nan, 1]})
        predicted = outputs(
            click=[0.1, 0.2], conversion=[0.5, 0.5], click_and_conversion=[0.1, 0.1]
        )
        found = measured(Chain(), rows, predicted)
        assert "rate_auc" not in found
        assert found["first_auc"] == 1.0

    def test_models(self):
        assert Chain().models == MODELS


AMOUNTS = Separate(
    (Goal("spend"), Goal("amount", "regression", "spend"), Goal("dollars", "ziln"))
)


SPENDING = part(
    {"spend": [1, 0, 1], "amount": [2, np.nan, -1], "dollars": [3.0, 0.0, 1.0]}
)
EXPECTED = {
    "spend": np.float32([[0.8], [0.4], [0.5]]),
    "amount": np.float32([[1], [7], [1]]),
    # p, mu, sigma: the expectations are 0.5 e^0.5, 0.1 e^0.5 and e^0.5.
    "dollars": np.float32([[0.5, 0, 1], [0.1, 0, 1], [1.0, 0, 1]]),
}


class TestSeparate:
    def test_losses_count_defined_rows(self):
        found = AMOUNTS.losses(SPENDING, EXPECTED)
        total, weight = found["spend"]
        assert weight == 3
        assert total == pytest.approx(-math.log(0.8 * 0.6 * 0.5), rel=1e-5)
        assert found["amount"] == (pytest.approx(1.0 + 4.0), 2)

    def test_a_task_without_a_label(self):
        rows = part({"a": [1, 0], "b": [np.nan, np.nan]})
        problem = Separate((Goal("a"), Goal("b")))
        predicted = outputs(a=[0.5, 0.5], b=[0.1, 0.1])
        found = problem.losses(rows, predicted)
        assert found["b"] == (0.0, 0)
        assert total_loss([found]) == pytest.approx(math.log(2), rel=1e-5)
        assert set(measured(problem, rows, predicted)) == {"a_auc", "a_ne"}

    def test_metrics(self):
        found = measured(AMOUNTS, SPENDING, EXPECTED)
        assert set(found) == set(AMOUNTS.metrics)
        assert found["amount_rmse"] == pytest.approx(math.sqrt((1 + 4) / 2))
        # Of the pairs (3, 0), (3, 1), (1, 0) the second is not in order.
        assert found["dollars_xauc"] == pytest.approx(2 / 3)
        assert found["dollars_pcoc"] == pytest.approx(1.6 * math.exp(0.5) / 4)

    def test_excess_over_the_truth(self):
        problem = Separate((Goal("a"),), known_truth=True)
        rows = part({"a": [np.nan, 1]}, {"a": [0.5, 0.9]})
        found = measured(problem, rows, outputs(a=[0.5, 0.9]))
        assert found["a_excess"] == pytest.approx(0.0, abs=1e-6)
        assert set(found) <= set(problem.metrics)

    def test_models(self):
        assert AMOUNTS.models == NAIVE


def test_total_loss_is_a_mean_over_the_rows_of_all_batches():
    # (1 + 5) / (1 + 3) + (2 + 0) / (1 + 0)
    batches = [{"a": (1.0, 1), "b": (2.0, 1)}, {"a": (5.0, 3), "b": (0.0, 0)}]
    assert total_loss(batches) == 3.5


def test_log_loss_of_a_certain_prediction_is_finite():
    found = log_loss(np.float64([1, 0, 0.5]), np.float32([0, 1, 1]))
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(-math.log(1e-7))
