"""The order of the runs, and resuming."""

from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.task_correlation import study
from recsys_examples.task_correlation.results import Result, ResultsFile
from recsys_examples.task_correlation.settings import Recipe, Settings
from recsys_examples.task_correlation.study import Study, train_round

SETTINGS = Settings(learning_rates=(0.1, 0.2), tuning_runs=2)
ONE_RATE = replace(SETTINGS, learning_rates=(0.3,))
WIDTHS = {"A": 1, "B": 2}
CORRELATIONS = (0.0, 1.0)
# The best rate of model A depends on p; at p = 1 the first is better on average.
TUNING = {
    ("A", 0.0, 0.1): [2.0, 2.0],
    ("A", 0.0, 0.2): [1.0, 1.0],
    ("A", 1.0, 0.1): [3.0, 1.0],
    ("A", 1.0, 0.2): [2.0, 5.0],
    ("B", 0.0, 0.1): [1.0, 1.0],
    ("B", 0.0, 0.2): [1.5, 1.0],
    ("B", 1.0, 0.1): [1.0, 1.0],
    ("B", 1.0, 0.2): [1.0, 1.5],
}
BEST = {("A", 0.0): 0.2, ("A", 1.0): 0.1, ("B", 0.0): 0.1, ("B", 1.0): 0.1}


def loss_of(model, p, run):
    """A different loss for each run."""
    return 10.0 * "AB".index(model) + p + run / 100


@pytest.fixture
def trained(monkeypatch):
    """The list of trainings, in order, with a fake training function."""
    done = []

    def train_round(wanted, settings, widths):
        assert settings in (SETTINGS, ONE_RATE)
        assert widths == WIDTHS
        results = []
        for model, rate in wanted.trainings:
            key = (model, wanted.correlation, wanted.run, rate, wanted.tuning)
            done.append(key)
            if wanted.tuning:
                loss = TUNING[model, wanted.correlation, rate][wanted.run]
            else:
                loss = loss_of(model, wanted.correlation, wanted.run)
            # The losses of the tasks differ; the study uses their mean.
            losses = (loss - 0.5, loss + 0.5)
            results.append(Result(*key, losses, seconds=0.1))
        return results

    monkeypatch.setattr(study, "train_round", train_round)
    return done


@pytest.fixture
def make(tmp_path):
    def call(runs=3, correlations=CORRELATIONS, settings=SETTINGS, resume=False):
        file = ResultsFile(tmp_path / "results.jsonl", {}, resume)
        return Study(settings, WIDTHS, correlations, runs, file)

    return call


class TestStudy:
    def test_all_runs(self, trained, make):
        work, progress = make(), []
        work.run(progress.append)
        # 2 tuning runs of 2 rates and 3 runs, for 2 models and 2 correlations.
        assert work.trainings == len(trained) == (2 * 2 + 3) * 4
        assert len(set(trained)) == len(trained)
        assert progress[0] == 0
        assert progress == sorted(progress)
        assert progress[-1] == work.trainings
        tuning = [key for key in trained if key[-1]]
        assert trained[: len(tuning)] == tuning
        assert len(tuning) == 16
        for model, p, _, rate, _ in trained[len(tuning) :]:
            assert rate == BEST[model, p]

    def test_learning_rates(self, trained, make):
        work = make()
        work.run(lambda _: None)
        for (model, p), rate in BEST.items():
            assert work.learning_rate(model, p) == rate

    def test_losses(self, trained, make):
        work = make()
        work.run(lambda _: None)
        losses = work.losses()
        assert list(losses) == ["A", "B"]
        for model, found in losses.items():
            assert list(found) == [0.0, 1.0]
            for p, runs in found.items():
                expected = [loss_of(model, p, run) for run in range(3)]
                np.testing.assert_allclose(runs, expected)

    def test_one_rate_is_not_tuned(self, trained, make):
        work = make(runs=2, settings=ONE_RATE)
        work.run(lambda _: None)
        assert work.trainings == len(trained) == 8
        assert {key[3:] for key in trained} == {(0.3, False)}

    @pytest.mark.parametrize("stopped_after", [0, 1, 5, 16, 17, 26])
    def test_an_interrupted_study_resumes(self, trained, make, stopped_after):
        def stop(done):
            if done >= stopped_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make().run(stop)
        assert stopped_after <= len(trained) < 28
        work, progress = make(resume=True), []
        work.run(progress.append)
        assert len(set(trained)) == len(trained) == 28
        assert progress[-1] == 28
        np.testing.assert_allclose(work.losses()["B"][1.0], [11.0, 11.01, 11.02])

    def test_resume_a_finished_study(self, trained, make):
        make().run(lambda _: None)
        done, progress = len(trained), []
        make(resume=True).run(progress.append)
        assert len(trained) == done
        assert progress[-1] == 28

    def test_more_runs_and_correlations(self, trained, make):
        make(runs=2, correlations=(1.0,)).run(lambda _: None)
        work = make(resume=True)
        work.run(lambda _: None)
        assert len(set(trained)) == len(trained) == 28
        np.testing.assert_allclose(work.losses()["A"][0.0], [0.0, 0.01, 0.02])

    def test_fewer_runs(self, trained, make):
        make().run(lambda _: None)
        work = make(runs=2, correlations=(1.0,), resume=True)
        work.run(lambda _: None)
        assert len(trained) == 28
        assert work.losses()["A"].keys() == {1.0}
        assert len(work.losses()["A"][1.0]) == 2


class Recorder:
    """A fake trainer that records its arguments."""

    def __init__(self):
        self.given = []

    def run(self, pair, steps, learning_rate, seed):
        self.given.append((pair, steps, learning_rate, seed))
        return (0.5, 0.25)


class TestRound:
    SETTINGS = Settings(Recipe(dimension=4, train_rows=8, test_rows=4), steps=7, seed=3)

    @pytest.fixture
    def given(self, monkeypatch):
        recorder = Recorder()
        monkeypatch.setattr(study, "_trainer", lambda *_: recorder)

        def call(**changed):
            described = {"correlation": 0.5, "run": 2, "tuning": False, **changed}
            wanted = study.Round(**described, trainings=(("A", 0.1), ("B", 0.2)))
            results = train_round(wanted, self.SETTINGS, WIDTHS)
            given, recorder.given = recorder.given, []
            return results, given

        return call

    def test_results(self, given):
        results, _ = given()
        assert [replace(r, seconds=0.0) for r in results] == [
            Result("A", 0.5, 2, 0.1, False, (0.5, 0.25), 0.0),
            Result("B", 0.5, 2, 0.2, False, (0.5, 0.25), 0.0),
        ]

    def test_models_share_data_and_seed(self, given):
        _, (first, second) = given()
        assert first[0] is second[0]
        assert first[1] == second[1] == 7
        assert (first[2], second[2]) == (0.1, 0.2)
        assert first[3] == second[3]

    @pytest.mark.parametrize("change", [{"run": 3}, {"tuning": True}], ids=str)
    def test_other_runs_have_other_data_and_weights(self, given, change):
        _, (one, _) = given()
        _, (other, _) = given(**change)
        assert not np.allclose(one[0].train.inputs, other[0].train.inputs)
        assert not np.allclose(one[0].weights, other[0].weights)
        assert one[3] != other[3]

    def test_another_correlation_has_the_same_inputs_and_weights(self, given):
        _, (one, _) = given()
        _, (other, _) = given(correlation=1.0)
        np.testing.assert_array_equal(one[0].train.inputs, other[0].train.inputs)
        assert one[3] == other[3]
