"""Simulated impressions: rates, correlation, and what each selection bias does."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.click_conversion import simulator
from recsys_examples.click_conversion.data import joint_label
from recsys_examples.click_conversion.simulator import (
    COUNTERFACTUAL,
    P_BOTH,
    P_CLICK,
    P_CONVERSION,
    P_CONVERSION_GIVEN_CLICK,
    Impressions,
    sample_impressions,
    simulate,
)

DEFAULT = Impressions(rows=100_000, users=10_000)


def inputs(part):
    return np.stack(list(part.features.values()), axis=1).astype(np.float64)


def logit(p):
    return np.log(p / (1 - p))


def clicked(part):
    return part.labels["click"] == 1


class TestRates:
    @pytest.mark.parametrize("bias", [{}, {"covariate_shift": 2}, {"confounding": 2}])
    def test_marginal_rates(self, bias):
        settings = replace(DEFAULT, click_rate=0.05, conversion_rate=0.3, **bias)
        rows = sample_impressions(settings, 1)
        # Probabilities: set by the intercepts. Labels: standard errors below 0.0015.
        assert rows.truth[P_CLICK].mean() == pytest.approx(0.05, abs=3e-4)
        assert rows.truth[P_CONVERSION].mean() == pytest.approx(0.3, abs=3e-4)
        assert rows.labels["click"].mean() == pytest.approx(0.05, abs=0.004)
        assert rows.truth[COUNTERFACTUAL].mean() == pytest.approx(0.3, abs=0.006)
        joint = joint_label(rows.labels, "click", "conversion")
        assert joint.mean() == pytest.approx(rows.truth[P_BOTH].mean(), rel=0.05)

    def test_conversions_are_observed_on_clicked_rows(self):
        rows = sample_impressions(DEFAULT)
        conversion = rows.labels["conversion"]
        np.testing.assert_array_equal(np.isnan(conversion), ~clicked(rows))
        np.testing.assert_array_equal(
            conversion[clicked(rows)], rows.truth[COUNTERFACTUAL][clicked(rows)]
        )


class TestCorrelation:
    @pytest.mark.parametrize("p", [-1.0, -0.5, 0.0, 0.5, 1.0])
    def test_of_the_logits(self, p):
        truth = sample_impressions(replace(DEFAULT, correlation=p), 2).truth
        found = np.corrcoef(logit(truth[P_CLICK]), logit(truth[P_CONVERSION]))[0, 1]
        assert found == pytest.approx(p, abs=0.05)

    @pytest.mark.parametrize("p", [-0.8, 0.8])
    def test_sign_of_the_difference_between_clicked_and_all_rows(self, p):
        rows = sample_impressions(replace(DEFAULT, correlation=p), 3)
        truth = rows.truth[P_CONVERSION]
        assert (truth[clicked(rows)].mean() - truth.mean()) * p > 0.05

    def test_standard_deviation_is_the_signal(self):
        truth = sample_impressions(DEFAULT, 2).truth
        for name in (P_CLICK, P_CONVERSION):
            assert logit(truth[name]).std() == pytest.approx(1.5, rel=0.05)


class TestNoBias:
    def test_conversion_given_click_is_the_truth(self):
        for shift in (0.0, 2.0):
            rows = sample_impressions(replace(DEFAULT, covariate_shift=shift))
            np.testing.assert_allclose(
                rows.truth[P_CONVERSION_GIVEN_CLICK], rows.truth[P_CONVERSION]
            )
            np.testing.assert_allclose(
                rows.truth[P_BOTH], rows.truth[P_CLICK] * rows.truth[P_CONVERSION]
            )

    def test_clicked_rows_are_calibrated_in_every_bin(self):
        rows = sample_impressions(replace(DEFAULT, covariate_shift=1.5), 4)
        truth = rows.truth[P_CONVERSION][clicked(rows)]
        label = rows.labels["conversion"][clicked(rows)]
        bins = np.quantile(truth, [0, 0.25, 0.5, 0.75, 1])
        for low, high in itertools.pairwise(bins):
            inside = (truth >= low) & (truth <= high)
            # About 2,500 rows: the standard error is at most 0.01.
            assert label[inside].mean() == pytest.approx(
                truth[inside].mean(), abs=0.035
            )

    def test_uncorrelated_clicks_select_at_random(self):
        rows = sample_impressions(replace(DEFAULT, correlation=0.0), 5)
        truth = rows.truth[P_CONVERSION]
        assert truth[clicked(rows)].mean() == pytest.approx(truth.mean(), abs=0.01)
        label = rows.labels["conversion"][clicked(rows)]
        assert label.mean() == pytest.approx(truth.mean(), abs=0.015)


class TestConfounding:
    def test_clicked_rows_convert_more_than_the_truth_at_every_x(self):
        rows = sample_impressions(replace(DEFAULT, confounding=1.0, correlation=0.0), 6)
        given, truth = (
            rows.truth[name] for name in (P_CONVERSION_GIVEN_CLICK, P_CONVERSION)
        )
        assert np.all(given > truth)
        label = rows.labels["conversion"][clicked(rows)]
        expected = given[clicked(rows)].mean()
        assert label.mean() == pytest.approx(expected, abs=0.015)
        assert expected > truth[clicked(rows)].mean() + 0.08

    def test_more_confounding_is_more_bias(self):
        gaps = []
        for strength in (0.0, 0.5, 1.0, 2.0):
            truth = sample_impressions(replace(DEFAULT, confounding=strength)).truth
            gaps.append((truth[P_CONVERSION_GIVEN_CLICK] - truth[P_CONVERSION]).mean())
        assert gaps == sorted(gaps)
        assert gaps[0] == pytest.approx(0, abs=1e-12)

    def test_the_truth_is_the_mean_over_the_hidden_variable(self):
        # By hand at logits 0 and strength 1, with a fine grid of u instead of the
        # quadrature: E[s(u)] = 0.5, E[s(u)^2] = 0.2934, s the sigmoid.
        zero = np.zeros(1)
        truth = simulator._truth(zero, zero, strength=1.0)
        u = np.linspace(-10, 10, 200_001)
        density = np.exp(-(u**2) / 2)
        squared = (density / (1 + np.exp(-u)) ** 2).sum() / density.sum()
        assert truth[P_CLICK][0] == pytest.approx(0.5)
        assert truth[P_BOTH][0] == pytest.approx(squared, abs=1e-6)
        assert truth[P_CONVERSION_GIVEN_CLICK][0] == pytest.approx(
            2 * squared, abs=1e-6
        )

    def test_the_counterfactual_label_follows_the_truth(self):
        rows = sample_impressions(replace(DEFAULT, confounding=1.5), 7)
        gap = rows.truth[COUNTERFACTUAL] - rows.truth[P_CONVERSION]
        assert gap.mean() == pytest.approx(0, abs=0.005)
        # Without a click, conversions would be rarer than the truth: u is smaller.
        assert gap[~clicked(rows)].mean() < -0.01


class TestCovariateShift:
    """A linear model, too simple for the truth, trained on clicked rows."""

    def losses(self, shift):
        """Excess log loss over all test impressions: naive, weighted by propensity."""
        from sklearn.linear_model import LogisticRegression

        data = simulate(replace(DEFAULT, covariate_shift=shift), 1)
        train, truth = data.train, data.test.truth[P_CONVERSION]
        rows = clicked(train)
        found = []
        for weight in (np.ones(rows.sum()), 1 / train.truth[P_CLICK][rows]):
            model = LogisticRegression().fit(
                inputs(train)[rows],
                train.labels["conversion"][rows],
                sample_weight=weight / weight.mean(),
            )
            p = model.predict_proba(inputs(data.test))[:, 1]
            loss = truth * np.log(truth / p) + (1 - truth) * np.log(
                (1 - truth) / (1 - p)
            )
            found.append(loss.mean())
        return found

    def test_clicks_follow_a_direction_with_which_conversions_bend(self):
        settings = replace(DEFAULT, covariate_shift=4.0, correlation=0.0)
        rows = sample_impressions(settings, 2)
        click, conversion = (logit(rows.truth[k]) for k in (P_CLICK, P_CONVERSION))
        assert np.corrcoef(click, conversion)[0, 1] == pytest.approx(0, abs=0.05)
        # 4^2 of the variance of 4^2 + 1.5^2 is linear: 0.88.
        x = inputs(rows)
        w = np.linalg.lstsq(x, click - click.mean(), rcond=None)[0]
        assert np.var(x @ w) / np.var(click) > 0.85
        # The bend is half of the variance of the conversion logit.
        direction = x @ w / np.std(x @ w)
        found = np.corrcoef(direction**2, conversion)[0, 1]
        assert found == pytest.approx(np.sqrt(0.5), abs=0.1)

    def test_shift_harms_a_simple_model_and_weights_help(self):
        naive, weighted = self.losses(0.0)
        assert weighted == pytest.approx(naive, abs=0.01)
        shifted, corrected = self.losses(2.0)
        assert shifted > naive + 0.1
        assert corrected < shifted - 0.05


class TestDraws:
    def test_the_same_seed(self):
        one, same = (simulate(DEFAULT, 3).fingerprint() for _ in range(2))
        assert one == same != simulate(DEFAULT, 4).fingerprint()

    def test_features_do_not_depend_on_bias(self):
        biased = replace(DEFAULT, confounding=1.0, covariate_shift=1.0, click_rate=0.3)
        np.testing.assert_array_equal(
            inputs(sample_impressions(DEFAULT)), inputs(sample_impressions(biased))
        )

    def test_features_are_standard_normal_and_alike_within_a_user(self):
        rows = sample_impressions(DEFAULT)
        x = inputs(rows)
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.05)
        np.testing.assert_allclose(x.std(axis=0), 1, atol=0.05)
        order = np.argsort(rows.groups, kind="stable")
        same = np.diff(rows.groups[order]) == 0
        pairs = x[order][:-1][same, 0], x[order][1:][same, 0]
        assert np.corrcoef(*pairs)[0, 1] == pytest.approx(0.3, abs=0.03)

    def test_users_are_in_one_part(self):
        users = [set(part.groups) for part in simulate(DEFAULT).parts.values()]
        assert sum(map(len, users)) == len(set.union(*users))

    def test_it_is_fast(self):
        # 0.3 s on an idle machine.
        sample_impressions(DEFAULT)
        start = time.process_time()
        sample_impressions(Impressions(confounding=1.0))
        assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rows": 0}, "rows must be at least 1; got 0"),
        ({"features": 2}, "features must be at least 3; got 2"),
        ({"users": 2}, "users must be at least 3; got 2"),
        ({"user_share": 1.0}, r"user_share must be in \[0, 1\); got 1.0"),
        ({"click_rate": 0.0}, r"click_rate must be in \(0, 1\); got 0.0"),
        ({"conversion_rate": 1.0}, r"conversion_rate must be in \(0, 1\); got 1.0"),
        ({"correlation": 1.1}, r"correlation must be in \[-1, 1\]; got 1.1"),
        ({"signal": -1.0}, "signal must be >= 0; got -1.0"),
        ({"covariate_shift": -0.1}, "covariate_shift must be >= 0; got -0.1"),
        ({"confounding": float("nan")}, "confounding must be >= 0; got nan"),
    ],
)
def test_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Impressions(**setting)
