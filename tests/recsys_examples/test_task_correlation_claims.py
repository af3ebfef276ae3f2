"""The paper's claims, tested on constructed losses."""

import numpy as np
import pytest

from recsys_examples.task_correlation.claims import (
    bootstrap,
    check_claims,
    difference,
    mean,
    standard_deviation,
)
from recsys_examples.task_correlation.settings import BOTTOM, MMOE, MODELS, OMOE, PLE

RUNS = 30
SIGNS = np.tile([-1.0, 1.0], RUNS // 2)
# Uncorrelated with SIGNS: differences of two models then vary over runs.
OTHER_SIGNS = np.repeat([-1.0, 1.0], RUNS // 2)
CORRELATIONS = (0.0, 0.5, 1.0)


def results(**changed):
    """Losses for which all claims are true, with changes.

    A change is a function of p that returns the mean and half-width of the losses.
    """
    described = {
        "bottom": lambda p: (1.0, 0.2),
        "omoe": lambda p: (0.8 - 0.2 * p, 0.02),
        "mmoe": lambda p: (0.6, 0.02),
        "ple": lambda p: (0.5, 0.02),
        **changed,
    }
    losses = {}
    for model, name in zip(MODELS, described, strict=True):
        signs = OTHER_SIGNS if model == MMOE else SIGNS
        losses[model] = {}
        for p in CORRELATIONS:
            centre, width = described[name](p)
            losses[model][p] = centre + width * signs
    return losses


def verdicts(losses):
    return [claim.holds for claim in check_claims(losses)]


def test_all_true():
    claims = check_claims(results())
    assert [claim.holds for claim in claims] == [True] * 4
    assert claims[0].text == "mixtures beat the shared bottom at every p"
    # OMoE, MMoE and PLE at three correlations.
    assert len(claims[0].evidence) == len(claims[1].evidence) == 9
    # 1.0 - 0.8 and, with p = 1, 1.0 - 0.6
    assert claims[0].evidence[0].startswith("p = 0, OMoE: +0.2000 [+0.")
    assert claims[0].evidence[6].startswith("p = 1, OMoE: +0.4000 [+0.")
    assert claims[2].evidence[0].endswith("margin 0.0600")
    assert claims[3].evidence[-1].startswith("p = 0 minus p = 1: +0.2000")


class TestBetter:
    @pytest.mark.parametrize("model", ["omoe", "mmoe"])
    @pytest.mark.parametrize("weak_at", CORRELATIONS)
    def test_worse_at_one_p(self, model, weak_at):
        losses = results(**{model: lambda p: (1.1 if p == weak_at else 0.6, 0.02)})
        assert verdicts(losses)[0] is False

    def test_better_but_not_significantly(self):
        # The signs are uncorrelated: the difference has a standard deviation of
        # sqrt(1 + 1) and its mean over 30 runs one of 0.26; the gain is 0.1.
        losses = results(
            bottom=lambda p: (1.0, 1.0),
            omoe=lambda p: (0.9, 1.0),
            mmoe=lambda p: (0.9, 1),
        )
        assert verdicts(losses)[0] is False

    def test_runs_are_compared_in_pairs(self):
        # OMoE has the signs of the shared bottom: every run is better by 0.1.
        losses = results(bottom=lambda p: (1.0, 0.9), omoe=lambda p: (0.9, 0.9))
        first = check_claims(losses)[0]
        assert first.holds is True
        assert first.evidence[0] == "p = 0, OMoE: +0.1000 [+0.1000, +0.1000]"

    def test_ple_does_not_affect_the_claims(self):
        assert verdicts(results(ple=lambda p: (2.0, 0.9))) == [True] * 4


class TestVariation:
    @pytest.mark.parametrize("model", ["omoe", "mmoe"])
    @pytest.mark.parametrize("wide_at", CORRELATIONS)
    def test_larger_at_one_p(self, model, wide_at):
        centre = {"omoe": lambda p: 0.8 - 0.2 * p, "mmoe": lambda p: 0.6}[model]
        losses = results(
            **{model: lambda p: (centre(p), 0.3 if p == wide_at else 0.02)}
        )
        assert verdicts(losses)[:2] == [True, False]

    def test_equal(self):
        losses = results(bottom=lambda p: (1.0, 0.02))
        assert verdicts(losses) == [True, False, True, True]


class TestEqual:
    @pytest.mark.parametrize("centre", [0.51, 0.69])
    def test_another_mean(self, centre):
        # OMoE's mean at p = 1 is 0.6, and the margin is 10% of it.
        losses = results(mmoe=lambda p: (centre if p == 1.0 else 0.4, 0.02))
        assert verdicts(losses)[2] is False

    def test_within_the_margin(self):
        losses = results(mmoe=lambda p: (0.56, 0.02))
        assert verdicts(losses)[2] is True

    def test_wide_interval(self):
        # Equal means, but the standard error of their difference is
        # 0.6 sqrt(2) / sqrt(30) = 0.15; the margin is 0.06.
        losses = results(omoe=lambda p: (0.6, 0.6), mmoe=lambda p: (0.6, 0.6))
        assert verdicts(losses)[2] is False


class TestGrows:
    @pytest.mark.parametrize(
        "lead",
        [
            {0.0: 0.1, 0.5: 0.1, 1.0: 0.1},
            {0.0: 0.0, 0.5: 0.1, 1.0: 0.2},
            {0.0: 0.2, 0.5: 0.0, 1.0: 0.1},
            {0.0: 0.1, 0.5: 0.2, 1.0: 0.0},
        ],
        ids=["constant", "shrinks", "dips", "peaks"],
    )
    def test_does_not_grow(self, lead):
        losses = results(omoe=lambda p: (0.6 + lead[p], 0.02))
        assert verdicts(losses)[3] is False

    def test_grows_but_not_significantly(self):
        losses = results(
            omoe=lambda p: (0.61 - 0.01 * p, 0.3 if p == 0.0 else 0.02),
        )
        assert verdicts(losses)[3] is False

    def test_two_correlations(self):
        losses = {
            model: {p: found[p] for p in (0.5, 1.0)}
            for model, found in (results().items())
        }
        assert verdicts(losses) == [True] * 4


class TestNotChecked:
    def test_no_results(self):
        assert verdicts({}) == [None] * 4

    @pytest.mark.parametrize(
        ("left_out", "expected"),
        [
            (BOTTOM, [None, None, True, True]),
            (OMOE, [None] * 4),
            (MMOE, [None] * 4),
            (PLE, [True] * 4),
        ],
    )
    def test_a_model_is_missing(self, left_out, expected):
        losses = results()
        del losses[left_out]
        assert verdicts(losses) == expected

    def test_no_identical_tasks(self):
        losses = {
            model: {p: found[p] for p in (0.0, 0.5)}
            for model, found in results().items()
        }
        assert verdicts(losses) == [True, True, None, True]

    def test_one_correlation(self):
        losses = {model: {1.0: found[1.0]} for model, found in results().items()}
        assert verdicts(losses) == [True, True, True, None]

    def test_few_runs(self):
        losses = {
            model: {p: runs[:4] for p, runs in found.items()}
            for model, found in results().items()
        }
        assert verdicts(losses) == [None] * 4


class TestBootstrap:
    def test_mean(self):
        # 400 runs of ±1: the standard error is 1 / 20; the interval is ±1.96 of it.
        runs = np.tile([-1.0, 1.0], 200)
        interval = bootstrap(mean, runs)
        assert interval.value == 0
        assert interval.low == pytest.approx(-0.098, abs=0.006)
        assert interval.high == pytest.approx(0.098, abs=0.006)

    def test_standard_deviation(self):
        # Deviations -1, 0, 1: sqrt(2 / (3 - 1)) = 1.
        assert standard_deviation(np.array([4.0, 5.0, 6.0])) == pytest.approx(1)

    def test_resampling_keeps_pairs(self):
        runs = np.random.default_rng(0).normal(size=30)
        interval = difference(mean, runs + 0.5, runs)
        for end in (interval.value, interval.low, interval.high):
            assert end == pytest.approx(0.5)

    def test_deterministic(self):
        runs = np.random.default_rng(0).normal(size=30)
        assert bootstrap(standard_deviation, runs) == bootstrap(
            standard_deviation, runs
        )
