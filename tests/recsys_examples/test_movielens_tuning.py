"""Tuning: the best settings on validation are selected, within the time budget."""

from dataclasses import replace

import pytest

from recsys_examples.movielens import baselines, tuning
from recsys_examples.movielens.data import DEFAULT_NAME
from recsys_examples.movielens.ranking import rank
from recsys_examples.movielens.tuning import als_for, als_record, als_summary, tune

# Settings with different rankings; those of the default data come first.
GRID = (
    baselines.TUNED_ALS,
    baselines.ALSSettings(factors=2, regularization=30.0, alpha=20),
    baselines.ALSSettings(factors=4, regularization=1.0, alpha=1),
    baselines.ALSSettings(factors=16, regularization=0.01, alpha=0.5),
)


@pytest.fixture
def before_test(windows):
    """The data without the test window, which tuning must not use."""
    return replace(windows, before_test=None, test=None, test_task=None)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is advanced by a fake baseline."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(tuning, "perf_counter", clock)
    return clock


class TestBest:
    def test_als_is_tuned_on_other_data(self, before_test, monkeypatch):
        monkeypatch.setattr(baselines, "SMALL_ALS_GRID", GRID)
        found = als_for(before_test, "other", seed=4, budget_s=60)
        watched = before_test.train.matrix(len(before_test.catalogue))
        scores = {
            settings: rank(
                baselines.als(watched, settings, 4), before_test.validation_task
            )["ndcg@10"]
            for settings in GRID
        }
        assert len(set(scores.values())) == len(GRID)
        assert found.settings == max(scores, key=scores.__getitem__)
        assert found.settings != baselines.TUNED_ALS
        assert found.ndcg == pytest.approx(max(scores.values()))
        assert (found.tried, found.planned, found.data) == (4, 4, "other")

    def test_default_data_uses_the_settings_of_the_study(self):
        found = als_for(None, DEFAULT_NAME, seed=0, budget_s=60)
        assert found.settings == baselines.TUNED_ALS
        assert found.tried == len(baselines.ALS_GRID) == 150

    def test_every_value_of_the_whole_grid_is_in_the_small_one(self):
        assert len(baselines.SMALL_ALS_GRID) == len(set(baselines.SMALL_ALS_GRID)) == 15
        assert set(baselines.SMALL_ALS_GRID) <= set(baselines.ALS_GRID)
        for few, all_ in zip(
            zip(*baselines.SMALL_ALS_GRID, strict=True),
            zip(*baselines.ALS_GRID, strict=True),
            strict=True,
        ):
            assert set(few) == set(all_)


class TestBudget:
    @pytest.fixture
    def tried(self, before_test, clock):
        """Tune a fake baseline whose settings are durations in seconds."""

        def call(seconds, budget_s):
            made = []

            def make(watched, takes):
                made.append(takes)
                clock.now += takes
                return baselines.popularity(watched)

            found = tune(before_test, make, seconds, "fake", "other", budget_s)
            assert found.tried == len(made)
            assert found.seconds == sum(made)
            assert found.planned == len(seconds)
            return made

        return call

    def test_stops_before_exceeding_the_budget(self, tried):
        # 3 settings take 30 s, and a fourth would end at 40 s.
        assert tried((10, 10, 10, 10, 10), 39) == [10, 10, 10]
        assert tried((10, 10, 10, 10, 10), 40) == [10, 10, 10, 10]

    def test_the_slowest_setting_is_the_estimate(self, tried):
        assert tried((1, 20, 1, 1, 1), 40) == [1, 20]
        assert tried((1, 20, 1, 1, 1), 41) == [1, 20, 1]

    def test_one_is_always_tried(self, tried):
        assert tried((500, 1), 180) == [500]
        assert tried((1, 1), 0) == [1]

    def test_all_without_a_budget(self, tried):
        assert tried((500, 500), float("inf")) == [500, 500]


class TestSummary:
    TUNED = tuning.Tuned(GRID[0], 0.125, 15, 15, 33.6, "other")

    @pytest.mark.parametrize(
        ("changed", "sentence"),
        [
            ({}, "ALS: best of 15 settings on validation, 34 s."),
            (
                {"tried": 8},
                "ALS: best of 8 of 15 settings on validation, 34 s "
                "(time budget: 40 s).",
            ),
            (
                {"tried": 1},
                "ALS: 1 of 15 settings on validation, 34 s (time budget: 40 s): "
                "not tuned on this data; the comparison is not fair.",
            ),
            (
                {"ndcg": None, "tried": 150},
                "ALS: settings tuned on the default data (150 settings).",
            ),
        ],
    )
    def test_line(self, changed, sentence):
        assert als_summary(replace(self.TUNED, **changed), 40.0) == sentence

    def test_record(self):
        assert als_record(self.TUNED) == {
            "settings": {"factors": 96, "regularization": 10.0, "alpha": 1},
            "tuned_on": "other",
            "tried": 15,
            "planned": 15,
            "validation_ndcg@10": 0.125,
            "seconds": 33.6,
        }
