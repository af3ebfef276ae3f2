"""The study: stored results, resuming, selection, comparison and reports."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from recsys_examples import comparison
from recsys_examples.census_income import report, search
from recsys_examples.census_income.features import GROUPS, Rows, Splits
from recsys_examples.census_income.models import Settings, build_models, parameters
from recsys_examples.census_income.names import (
    CHOICES,
    EQUAL_BOTTOM,
    SHARED_BOTTOM,
    SINGLE_TASK,
)
from recsys_examples.census_income.papers import REPORTED
from recsys_examples.census_income.results import Job, Results, best_trial
from recsys_examples.census_income.study import Found, Plan, Study, best_layer
from recsys_examples.census_income.training import Outcome
from recsys_examples.comparison import Comparison, compare
from recsys_examples.errors import InputError
from recsys_examples.runs import sealed

DATA = {"data": "tiny", "versions": {"keras": "3"}}


def outcome(validation=0.8, test=0.7, seconds=1.0):
    tasks = ("income", "education", "never_married")
    return Outcome(
        dict.fromkeys(tasks, validation),
        dict.fromkeys(tasks, test),
        dict.fromkeys(tasks, 3),
        1000,
        seconds,
    )


def by_job(job):
    """An outcome that is a pure function of the job, like a real run."""
    rng = np.random.default_rng([job.seed, len(job.model), job.settings.units])
    return outcome(*rng.uniform(0.7, 0.9, 2).round(6))


@pytest.fixture
def splits():
    rows = Rows(np.zeros((4, 6), np.int32), np.zeros((4, 3), np.float32), {})
    return Splits(rows, rows, rows, table_rows=40)


class Runner:
    """Runs jobs in reverse order; is interrupted after `stop_after` jobs."""

    def __init__(self, stop_after=10**6):
        self.done, self._left = [], stop_after

    def __call__(self, jobs):
        for job in reversed(jobs):
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            self.done.append(job)
            yield job, by_job(job)


PLAN = Plan(["income", "education"], [SHARED_BOTTOM, "MMoE", "PLE"], 3, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "results.jsonl"


def tables(path, splits, runner, plan=PLAN, resume=False):
    results = Results(path, DATA, resume)
    return dict(Study(plan, splits, results, runner).run())


class TestPlan:
    def test_every_run_is_done_once(self, path, splits):
        runner = Runner()
        found = tables(path, splits, runner)
        assert list(found) == ["income", "education"]
        assert len(runner.done) == PLAN.runs == 2 * 3 * (3 + 2)
        assert len({str(job) for job in runner.done}) == PLAN.runs
        for group, table in found.items():
            for model, result in table.items():
                jobs = [j for j in runner.done if (j.group, j.model) == (group, model)]
                trials = {j.trial: j for j in jobs if j.trial is not None}
                assert sorted(trials) == [0, 1, 2]
                for trial, job in trials.items():
                    assert job.settings == search.draw(model, trial)
                best = max(
                    trials.values(),
                    key=lambda j: by_job(j).validation[GROUPS[j.group].main],
                )
                runs = sorted(
                    (j for j in jobs if j.trial is None), key=lambda j: j.seed
                )
                assert [j.seed for j in runs] == [0, 1]
                assert all(j.settings == best.settings for j in runs)
                assert result.settings == best.settings
                assert result.outcomes == [by_job(j) for j in runs]

    def test_every_run_is_announced_after_it_was_stored(self, path, splits):
        announced = []

        def study(resume):
            results = Results(path, DATA, resume)

            def announce(job, outcome, is_new):
                assert results.get(job) == outcome
                assert (
                    not is_new
                    or str(outcome.test["income"])
                    in (path.read_text().splitlines()[-1])
                )
                announced.append(is_new)

            return Study(PLAN, splits, results, Runner(), announce)

        list(study(resume=False).run())
        assert announced == [True] * PLAN.runs
        list(study(resume=True).run())
        assert announced[PLAN.runs :] == [False] * PLAN.runs

    def test_models_alternate(self, path, splits):
        """An interrupted study has about as many trials of each model."""
        order = []

        def runner(jobs):
            order.extend(jobs)
            return ((job, by_job(job)) for job in jobs)

        tables(path, splits, runner)
        assert [job.trial for job in order[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert [job.model for job in order[:3]] == list(PLAN.models)

    def test_search_and_final_runs_have_different_seeds(self, path, splits):
        runner = Runner()
        tables(path, splits, runner, replace(PLAN, first_seed=5))
        seeds = {job.seed for job in runner.done if job.trial is None}
        assert seeds == {5, 6}
        assert not seeds & {job.seed for job in runner.done if job.trial is not None}
        assert runner.done[0].settings == search.draw("PLE", 2, 5)

    def test_equal_bottom(self, path, splits):
        """Its trials have the parameters of the best layer, within one percent."""
        runner = Runner()
        plan = replace(PLAN, groups=["income"], equal_bottom=True)
        (table,) = tables(path, splits, runner, plan).values()
        assert list(table) == [*PLAN.models, EQUAL_BOTTOM]
        assert len(runner.done) == plan.runs == 4 * (3 + 2)
        best = best_layer(table, "income")

        def count(model, settings):
            tasks = GROUPS["income"].tasks
            return parameters(build_models(model, settings, tasks, 40, 6, 3))

        target = count(best, table[best].settings)
        trials = [
            j for j in runner.done if j.model == EQUAL_BOTTOM and j.trial is not None
        ]
        assert len(trials) == 3
        for job in trials:
            assert count(EQUAL_BOTTOM, job.settings) == pytest.approx(target, rel=0.01)


class TestResume:
    JOB = Job("income", "MMoE", Settings(structure={"num_experts": 4}), 3, trial=1)

    @pytest.mark.parametrize("stop_after", [0, 1, 4, 10, 17, 29])
    def test_it_equals_an_uninterrupted_study(self, tmp_path, splits, stop_after):
        whole = tables(tmp_path / "whole", splits, Runner())
        path = tmp_path / "stopped"
        first, second = Runner(stop_after), Runner()
        with pytest.raises(KeyboardInterrupt):
            tables(path, splits, first)
        assert tables(path, splits, second, resume=True) == whole
        assert len(first.done) == stop_after
        assert len(first.done) + len(second.done) == PLAN.runs
        third = Runner()
        assert tables(path, splits, third, resume=True) == whole
        assert third.done == []

    def test_trials_can_be_added(self, path, tmp_path, splits):
        tables(path, splits, Runner())
        before = path.read_text()
        runner = Runner()
        more = replace(PLAN, trials=5)
        found = tables(path, splits, runner, more, resume=True)
        assert found == tables(tmp_path / "fresh", splits, Runner(), more)
        assert sum(job.trial is not None for job in runner.done) == 2 * 3 * 2
        assert path.read_text().startswith(before)

    def test_not_without_the_flag(self, path, splits):
        tables(path, splits, Runner())
        before = path.read_bytes()
        with pytest.raises(InputError, match="add --resume to continue it"):
            tables(path, splits, Runner())
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", DATA)
    def test_not_from_other_data_or_versions(self, path, name):
        Results(path, DATA)
        with pytest.raises(InputError, match=f"made with {name} = .*, this .* other"):
            Results(path, {**DATA, name: "other"}, resume=True)

    @pytest.mark.parametrize("incomplete", ["", "{", '{"job": 3}', "null"])
    def test_an_incomplete_last_line_is_dropped(self, path, incomplete):
        Results(path, DATA).add(self.JOB, by_job(self.JOB))
        with path.open("a") as file:
            file.write(incomplete)
        again = Results(path, DATA, resume=True)
        assert len(again) == 1
        assert again.get(self.JOB) == by_job(self.JOB)
        # A final run with the same settings and seed is a different job.
        assert again.get(replace(self.JOB, trial=None)) is None

    @pytest.mark.parametrize(
        "line",
        [
            "{}",
            '{"job": 3, "outcome": 4}',
            '{"job": {"group": "income"}, "outcome": {}}',
            '{"job": {"settings": {"unit": 3}}, "outcome": {}}',
            '{"job": {"settings": 3}, "outcome": {}}',
        ],
    )
    def test_an_invalid_line_is_reported_by_number(self, path, line):
        Results(path, DATA).add(self.JOB, by_job(self.JOB))
        with path.open("a") as file:
            file.write(json.dumps(sealed(json.loads(line))) + "\n")
        with pytest.raises(InputError, match="line 3: not a run: ") as error:
            Results(path, DATA, resume=True)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_line_holds_the_job_and_its_outcome(self, path):
        Results(path, DATA).add(self.JOB, by_job(self.JOB))
        first, line = path.read_text().splitlines()
        assert json.loads(first) == sealed(DATA)
        record = json.loads(line)
        assert record["job"]["settings"]["structure"] == {"num_experts": 4}
        assert record["job"]["trial"] == 1
        assert set(record["outcome"]) == {
            "validation",
            "test",
            "epoch",
            "parameters",
            "seconds",
        }


class TestChoice:
    def test_by_validation_only(self):
        outcomes = [outcome(0.8, 0.99), outcome(0.9, 0.1), outcome(0.9, 0.2)]
        assert best_trial(outcomes, "income") == 1

    def test_the_best_layer_is_not_a_baseline(self):
        table = {
            SHARED_BOTTOM: Found(Settings(), [outcome(0.99)]),
            "MMoE": Found(Settings(), [outcome(0.8), outcome(0.9)]),
            "PLE": Found(Settings(), [outcome(0.84), outcome(0.84)]),
            EQUAL_BOTTOM: Found(Settings(), [outcome(0.99)]),
        }
        assert best_layer(table, "income") == "MMoE"
        assert best_layer({SHARED_BOTTOM: table[SHARED_BOTTOM]}, "income") is None


class TestComparison:
    def test_by_hand(self):
        """Differences 1, 2, 3, 4 (x 0.001): mean 2.5, deviation sqrt(5/3) = 1.291."""
        first = [0.901, 0.902, 0.903, 0.904]
        found = compare(first, [0.9] * 4)
        assert found.mean == pytest.approx(0.0025)
        assert found.deviation == pytest.approx(0.001 * np.sqrt(5 / 3))
        # t = 2.5 / (1.291 / 2) = 3.873 with 3 degrees of freedom.
        assert found.t_test == pytest.approx(0.0305, abs=1e-4)
        # All four signs are equal: 2 of the 16 equally likely patterns.
        assert found.wilcoxon == pytest.approx(2 / 16)
        assert found.better == 1.0
        assert found.holds

    def test_swapped_arguments(self):
        first, second = [0.91, 0.92, 0.95], [0.92, 0.91, 0.93]
        there, back = compare(first, second), compare(second, first)
        assert there.mean == pytest.approx(-back.mean)
        assert there.t_test == pytest.approx(back.t_test)
        assert (there.better, back.better) == (2 / 3, 1 / 3)

    @pytest.mark.parametrize(
        ("mean", "p", "holds"),
        [
            (0.0011, 0.01, True),
            (0.001, 0.01, True),
            (0.0009, 0.001, False),
            (0.005, 0.06, False),
            (-0.005, 0.01, False),
        ],
    )
    def test_thresholds(self, mean, p, holds):
        assert Comparison(mean, 0.001, 1.0, p, p).holds is holds
        assert comparison.GAIN == 0.001

    def test_no_variance(self):
        same = compare([0.5, 0.6], [0.5, 0.6])
        assert (same.mean, same.t_test, same.wilcoxon) == (0.0, 1.0, 1.0)
        assert not same.holds
        assert compare([0.75, 0.75], [0.5, 0.5]).holds

    @pytest.mark.parametrize(("a", "b"), [([0.5], [0.5]), ([1, 2], [1, 2, 3])])
    def test_too_few_or_unequal(self, a, b):
        with pytest.raises(ValueError, match="needs two or more seeds"):
            compare(a, b)


def rendered(renderable):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


class TestReport:
    def found(self, *tests):
        return Found(Settings(units=64), [outcome(0.8, test) for test in tests])

    def test_table(self):
        table = {SHARED_BOTTOM: self.found(0.90, 0.92), "MMoE": self.found(0.95, 0.93)}
        table["MMoE"] = replace(
            table["MMoE"], settings=Settings(units=64, structure={"num_experts": 4})
        )
        text = rendered(report.found_table("income", table, "34 of the 42 columns"))
        assert "Group 1" in text
        assert "34 of the 42 columns" in text
        (line,) = [line for line in text.splitlines() if "MMoE" in line]
        cells = [cell.strip() for cell in line.split("│")][1:-1]
        # The deviation of 0.93 and 0.95 is 0.02 / sqrt(2).
        assert cells == [
            "MMoE",
            *["0.9400 ± 0.0141", "0.9500"] * 2,
            "0.8000",
            "2",
            "256",
            "1,000",
            "1",
        ]

    def test_papers_have_a_table_with_its_source(self):
        for group in GROUPS:
            text = rendered(report.papers_table(group))
            assert "10.1145/3219819.3220007" in text
            assert "all 40 attributes" in text
            assert "0.9359" in text or "0.8826" in text
        assert REPORTED["income"]["MMoE"].main_best == 0.9410
        assert REPORTED["education"]["MMoE"].main_mean == 0.8826

    def test_verdict(self):
        near, ahead = [0.900, 0.901, 0.902], [0.9031, 0.9043, 0.9049]
        table = {
            SINGLE_TASK: self.found(*near),
            SHARED_BOTTOM: self.found(*near),
            "MMoE": self.found(*ahead),
            EQUAL_BOTTOM: self.found(*near),
        }
        text = "\n".join(report.verdict("income", table))
        assert "MMoE minus single-task: +0.00310" in text
        assert text.endswith("p < 0.05: yes")
        table[EQUAL_BOTTOM] = self.found(*ahead)
        assert report.verdict("income", table)[-1].endswith("p < 0.05: no")
        del table[EQUAL_BOTTOM]
        assert "p < 0.05:" not in "\n".join(report.verdict("income", table))

    def test_no_verdict_without_layer_and_baseline(self):
        assert report.verdict("income", {SHARED_BOTTOM: self.found(0.9)}) == []
        assert report.verdict("income", {"MMoE": self.found(0.9)}) == []
        one = {SHARED_BOTTOM: self.found(0.9), "MMoE": self.found(0.9)}
        assert "two or more seeds" in report.verdict("income", one)[-1]


def test_names_of_models_are_unique():
    assert len({model.lower() for model in [*CHOICES, EQUAL_BOTTOM]}) == 10
