"""Training: runs from new weights on one graph, in memory and batch by batch."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from recsys_examples.click_conversion.data import Part
from recsys_examples.click_conversion.models import Columns, Shape
from recsys_examples.click_conversion.problems import Chain
from recsys_examples.click_conversion.settings import BOTTOM, SINGLE
from recsys_examples.click_conversion.simulator import Impressions
from recsys_examples.click_conversion.sources import Files, SimulatedChain
from recsys_examples.click_conversion.training import Trainer, encode
from tests.support import click_logs

SETTINGS = Impressions(rows=2000, users=200, features=3, click_rate=0.5)
SOURCE = SimulatedChain("tiny", SETTINGS, Shape(4))


@dataclass(frozen=True)
class InBatches:
    """The rows of a source in batches."""

    source: SimulatedChain
    rows: int

    def parts(self, part, seed):
        (whole,) = self.source.parts(part, seed)
        for start in range(0, len(whole), self.rows):
            yield whole.take(np.arange(start, min(start + self.rows, len(whole))))


def make_trainer(model=BOTTOM, loss_weighting=None, source=SOURCE):
    return Trainer(
        source.problem, model, source.columns(), Shape(4), loss_weighting, 256
    )


@pytest.fixture(scope="module")
def trainer():
    return make_trainer()


class TestRuns:
    def test_a_run_depends_on_its_seed_alone(self, trainer):
        first = trainer.losses(SOURCE, 1, 0.01, (1, 2))
        other = trainer.losses(SOURCE, 2, 0.01, (1, 2))
        again = trainer.losses(SOURCE, 1, 0.01, (1, 2))
        assert first == pytest.approx(again, rel=1e-5)
        assert first != pytest.approx(other, rel=1e-3)

    def test_the_model_is_traced_once(self, trainer):
        trainer.losses(SOURCE, 3, 0.01, (1,))
        before = trainer._steps.experimental_get_tracing_count()
        trainer.losses(SOURCE, 4, 0.02, (1,))
        trainer.test(SOURCE, 5, 0.02, 1)
        assert trainer._steps.experimental_get_tracing_count() == before

    @pytest.mark.parametrize("weighting", ["rlw", "famo"])
    def test_a_weighting_is_reset(self, weighting):
        trainer = make_trainer(loss_weighting=weighting)
        first, again = (trainer.losses(SOURCE, 1, 0.01, (1,)) for _ in range(2))
        assert first == pytest.approx(again, rel=1e-5)

    def test_it_learns(self, trainer):
        found = trainer.losses(SOURCE, 1, 0.03, (1, 12))
        assert found[12] < found[1] - 0.01
        metrics = trainer.test(SOURCE, 1, 0.03, 12)
        assert metrics["first_auc"] > 0.7
        assert set(metrics) == set(SOURCE.problem.metrics)

    def test_a_run_of_more_epochs_begins_like_one_of_fewer(self, trainer):
        (two,) = trainer.losses(SOURCE, 1, 0.01, (2,)).values()
        assert trainer.losses(SOURCE, 1, 0.01, (2, 3))[2] == pytest.approx(
            two, rel=1e-5
        )

    def test_divergence_is_an_infinite_loss(self, trainer):
        bad = replace(SOURCE, name="bad")
        (part,) = bad.parts("train", 1)
        part.features["x0"][:] = np.nan
        try:
            assert trainer.losses(bad, 1, 0.01, (1,)) == {1: np.inf}
        finally:
            from recsys_examples.click_conversion import sources

            sources._kept.cache_clear()


class TestBatches:
    def test_predictions_do_not_depend_on_batches(self, trainer):
        whole = trainer.test(SOURCE, 1, 0.01, 1)
        trainer._reset(1, 0.01)
        trainer._train(SOURCE, 1, 1)
        meters = SOURCE.problem.meters()
        for part in InBatches(SOURCE, 57).parts("test", 1):
            SOURCE.problem.measure(meters, part, trainer._predict(part))
        assert meters.results() == pytest.approx(whole, rel=1e-4)

    @pytest.mark.parametrize("rows", [1, 100, 700])
    def test_batches_of_any_size(self, trainer, rows):
        """Below the batch size one step; above it, no row is left out but a rest."""
        source = InBatches(SOURCE, rows) if rows > 1 else InBatches(SOURCE, 1199)
        found = trainer.losses(source, 1, 0.01, (1,))
        assert np.isfinite(found[1])


@pytest.mark.parametrize("name", click_logs.NAMES)
def test_files(name, tmp_path):
    """The public logs, batch by batch."""
    click_logs.write(name, tmp_path, rows=200)
    source = Files(name, tmp_path, Shape(4), max_buckets=16)
    trainer = make_trainer(source=source)
    found = trainer.losses(source, 1, 0.03, (1, 2))
    # log 2 for the click, and half as much for the conversions of half of the rows
    assert all(0.3 < loss < 1.5 for loss in found.values())
    assert {"first_auc", "joint_pcoc"} <= set(trainer.test(source, 1, 0.03, 1))


def test_single_tasks_train_apart():
    trainer = make_trainer(SINGLE)
    assert np.isfinite(trainer.losses(SOURCE, 1, 0.01, (1,))[1])


def test_encode():
    part = Part(
        {"a": np.float32([1, 2]), "k": np.int32([3, 0]), "b": np.float32([5, 6])},
        {"click": np.float32([0, 1])},
        np.arange(2),
        np.zeros(2, np.int32),
    )
    found = encode(part, Columns(("b", "a"), (("k", 4),)))
    assert found["numbers"].tolist() == [[5, 1], [6, 2]]
    assert found["codes"].tolist() == [[3], [0]]
    assert set(encode(part, Columns(("a",), ()))) == {"numbers"}


def test_a_problem_can_be_the_key_of_a_cache():
    assert hash(Chain()) == hash(Chain())
