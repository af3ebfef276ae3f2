"""The order of the runs, tuning, resuming; tables and verdicts from stored results."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from recsys_examples.click_conversion import report, study
from recsys_examples.click_conversion.models import Shape
from recsys_examples.click_conversion.results import Job, Outcome, Results
from recsys_examples.click_conversion.settings import (
    AITM,
    BOTTOM,
    DR,
    ESMM,
    IPW,
    MMOE,
    SINGLE,
    Budget,
)
from recsys_examples.click_conversion.simulator import Impressions
from recsys_examples.click_conversion.sources import RandHie, SimulatedChain
from recsys_examples.click_conversion.study import TUNING_SEEDS, Study
from recsys_examples.errors import InputError
from recsys_examples.runs import sealed

CHAIN = SimulatedChain("chain", Impressions(), Shape(8))
AMOUNTS = RandHie("amounts", False, Shape(8))
BUDGET = Budget((0.1, 0.2), (1, 3), tuning_seeds=2, seeds=3, first_seed=7)
DATA = {"versions": {"keras": "3"}}


def make(path, resume=False, budget=BUDGET, models=(BOTTOM, ESMM), sources=(CHAIN,)):
    return Study(sources, models, budget, None, Results(path, DATA, resume))


def fake(wanted, budget, loss_weighting):
    """Validation losses with the best at 0.2 and 3 epochs for ESMM, else 0.1 and 1."""
    finished = []
    for job in wanted.jobs:
        if job.epochs:
            values = {"rate_auc_all": job.seed / 100 + 0.1 * (job.model == ESMM)}
        else:
            best = (0.2, 3) if job.model == ESMM else (0.1, 1)
            # Better on average, not in every run.
            noise = 0.4 if job.seed == TUNING_SEEDS + 7 else -0.1
            values = {
                str(epochs): 1.0 + noise * ((job.learning_rate, epochs) == best) - 0.3
                if (job.learning_rate, epochs) == best
                else 1.0
                for epochs in budget.epochs
            }
        finished.append((job, Outcome(values, 10, 0.5)))
    return finished


@pytest.fixture
def trained(monkeypatch):
    """The list of jobs that ran, with fake training in this process."""
    done = []

    def run_round(wanted, budget, loss_weighting):
        done.extend(wanted.jobs)
        return fake(wanted, budget, loss_weighting)

    class InThisProcess:
        def __init__(self, processes, prepare):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, work, items):
            return map(work, items)

    monkeypatch.setattr(study, "run_round", run_round)
    monkeypatch.setattr(study, "Workers", InThisProcess)
    return done


def run(work):
    steps = []
    work.run(steps.append, 1)
    return steps


class TestRuns:
    def test_order(self, trained, tmp_path):
        work = make(tmp_path / "results.jsonl")
        steps = run(work)
        # 2 models, 2 rates, 2 tuning seeds; then 2 models, 3 seeds.
        assert work.runs == len(trained) == 8 + 6
        assert steps[-1] == 14
        tuning, final = trained[:8], trained[8:]
        assert {job.seed for job in tuning} == {TUNING_SEEDS + 7, TUNING_SEEDS + 8}
        assert all(job.epochs == 0 for job in tuning)
        assert [job.seed for job in final] == [7, 7, 8, 8, 9, 9]
        assert {(j.model, j.learning_rate, j.epochs) for j in final} == {
            (BOTTOM, 0.1, 1),
            (ESMM, 0.2, 3),
        }

    def test_a_single_setting_is_not_tuned(self, trained, tmp_path):
        budget = replace(BUDGET, learning_rates=(0.5,), epochs=(4,))
        work = make(tmp_path / "results.jsonl", budget=budget)
        run(work)
        assert {(job.learning_rate, job.epochs) for job in trained} == {(0.5, 4)}
        assert work.chosen(CHAIN, ESMM) == (0.5, 4)

    def test_divergence_is_not_chosen(self, tmp_path):
        work = make(tmp_path / "results.jsonl", models=[BOTTOM])
        for rate, loss in ((0.1, None), (0.2, 5.0)):
            for seed in (TUNING_SEEDS + 7, TUNING_SEEDS + 8):
                job = Job("chain", BOTTOM, rate, seed)
                work._results.add([(job, Outcome({"1": loss, "3": None}, 1, 0.1))])
        assert work.chosen(CHAIN, BOTTOM) == (0.2, 1)

    def test_models_that_cannot_learn_a_problem_are_left_out(self, tmp_path):
        work = make(tmp_path / "results.jsonl", sources=(CHAIN, AMOUNTS))
        assert work.models(CHAIN) == [BOTTOM, ESMM]
        assert work.models(AMOUNTS) == [BOTTOM]


class TestResuming:
    def test_finished_runs_are_not_repeated(self, trained, tmp_path):
        path = tmp_path / "results.jsonl"
        run(make(path))
        lines = path.read_text().splitlines()
        # Stopped within the last round, in the middle of a line.
        path.write_text("\n".join([*lines[:-2], lines[-2][:20]]))
        trained.clear()
        steps = run(make(path, resume=True))
        assert [job.model for job in trained] == [BOTTOM, ESMM]
        assert steps[0] == 8
        assert steps[-1] == 14
        assert path.read_text().splitlines() == lines

    def test_seeds_and_models_may_be_added(self, trained, tmp_path):
        path = tmp_path / "results.jsonl"
        run(make(path))
        trained.clear()
        budget = replace(BUDGET, seeds=4)
        run(make(path, True, budget, (BOTTOM, ESMM, AITM)))
        assert {job.model for job in trained if job.epochs == 0} == {AITM}
        assert [j.seed for j in trained if j.model == BOTTOM] == [10]
        assert [j.seed for j in trained if j.model == AITM and j.epochs] == [
            7,
            8,
            9,
            10,
        ]

    def test_other_data(self, trained, tmp_path):
        run(make(tmp_path / "results.jsonl"))
        with pytest.raises(InputError, match="were made with versions"):
            Results(tmp_path / "results.jsonl", {"versions": {}}, resume=True)

    def test_a_damaged_line(self, tmp_path):
        path = tmp_path / "results.jsonl"
        Results(path, DATA)
        with path.open("a") as file:
            file.write(json.dumps(sealed({"job": {"source": "a"}})) + "\n")
        with pytest.raises(InputError, match=r"line 2: not a run"):
            Results(path, DATA, resume=True)


def text(table):
    console = Console(file=io.StringIO(), width=300)
    console.print(table)
    return console.file.getvalue()


AUC, ECE = report.RATE_AUC, report.RATE_ECE


def runs(auc, ece, others=0.5):
    """Metrics of eight runs that vary as the tests need."""
    wiggle = 0.001 * np.array([1, -1, 2, -2, 0, 1, -1, 0])
    return [
        {AUC: auc + w, ECE: ece - w / 2, "joint_pcoc": others + i}
        for i, w in enumerate(wiggle)
    ]


def spread(values):
    """The same with noise of another order, so that differences vary."""
    noise = 0.0005 * np.array([1, 1, -1, -1, 1, -1, 1, -1])
    return [
        {k: v + n for k, v in run.items()} for run, n in zip(values, noise, strict=True)
    ]


FOUND = {
    SINGLE: runs(0.60, 0.08),
    BOTTOM: spread(runs(0.60, 0.08)),
    IPW: runs(0.63, 0.05),
    DR: runs(0.65, 0.08),
    ESMM: runs(0.58, 0.09),
}


class TestReport:
    @pytest.fixture(autouse=True)
    def found(self, monkeypatch):
        monkeypatch.setattr(report, "found_metrics", lambda work, source: FOUND)

    def test_entire_space_verdict(self):
        lines = report.verdict(None, CHAIN)
        # DR ranks better, but is not better calibrated.
        assert lines[-1].endswith("each with p < 0.01: ESCM2-IPW")
        assert "+0.0300" in next(x for x in lines if x.startswith("ESCM2-IPW minus"))

    def test_nothing_is_better(self, monkeypatch):
        without = {m: runs for m, runs in FOUND.items() if m not in (IPW, DR)}
        monkeypatch.setattr(report, "found_metrics", lambda work, source: without)
        assert report.verdict(None, CHAIN)[-1].endswith("p < 0.01: none")

    def test_tables(self):
        tables = report.source_tables(None, CHAIN)
        assert len(tables) == 3
        assert "0.6300 ± 0.0013" in text(tables[0])
        assert " *" in text(tables[1])
        assert " !" in text(tables[1])
        assert "predicted / observed" in text(tables[0])
        assert "predicted / observed" not in text(tables[1])

    def test_real_data_verdict(self):
        source = RandHie("amounts", False, Shape(8))
        lines = report.verdict(None, replace(source, chain=True))
        assert lines[0].endswith(f"against {BOTTOM}, p < 0.01:")
        assert any(line.startswith(f"   {ESMM}: ") for line in lines)


class TestDifferences:
    def test_smaller_is_better(self):
        found = {"a": runs(0.6, 0.05), "b": spread(runs(0.6, 0.08))}
        result = report.difference(found, "a", "b", ECE)
        assert result.mean == pytest.approx(-0.03, abs=1e-3)
        assert report.better(ECE, result)
        assert not report.better(ECE, report.difference(found, "b", "a", ECE))

    def test_a_run_without_the_metric(self):
        found = {"a": runs(0.6, 0.05), "b": [*runs(0.6, 0.08)[:-1], {AUC: 0.5}]}
        assert report.difference(found, "a", "b", ECE) is None
        assert not report.better(ECE, None)


def test_tables_are_made_from_the_file(trained, tmp_path):
    path = tmp_path / "results.jsonl"
    run(make(path))
    lines = path.read_text().splitlines()
    changed = [
        re.sub(', "crc32": ".*"', "", line.replace('auc_all": 0.07}', 'auc_all": 0.5}'))
        for line in lines
    ]
    assert 'auc_all": 0.5}' in "".join(changed)
    path.write_text("\n".join(changed) + "\n")
    work = make(path, resume=True)
    # (0.5 + 0.08 + 0.09) / 3
    assert "0.2233 ± 0.2397" in text(report.source_tables(work, CHAIN)[0])
    settings = text(report.settings_table(work, CHAIN))
    assert ESMM in settings
    assert MMOE not in settings
