"""The sources: labels by hand, files of the published formats, held-out groups."""

import numpy as np
import pytest

from recsys_examples.click_conversion import rand_hie
from recsys_examples.click_conversion.data import Part
from recsys_examples.click_conversion.models import Shape
from recsys_examples.click_conversion.simulator import Impressions
from recsys_examples.click_conversion.sources import (
    HIGH,
    Files,
    RandHie,
    RandHiePair,
    SimulatedChain,
    SimulatedTasks,
)
from recsys_examples.click_conversion.streamed import first_rows, held_out
from recsys_examples.click_conversion.task_simulator import Tasks
from recsys_examples.errors import InputError
from tests.support import click_logs

CHAIN = RandHie("chain", True, Shape(4))


def only(source, part, seed=0):
    (found,) = source.parts(part, seed)
    return found


class TestRandHie:
    def test_a_high_amount_is_above_the_median_of_the_training_rows(self):
        plain = rand_hie.load_rand_hie(3)
        median = np.nanmedian(plain.train.labels[rand_hie.AMOUNT])
        for part in ("train", "test"):
            amount = plain.parts[part].labels[rand_hie.AMOUNT]
            high = only(CHAIN, part, 3).labels[HIGH]
            assert np.array_equal(np.isnan(high), np.isnan(amount))
            known = ~np.isnan(amount)
            assert np.array_equal(high[known], amount[known] > median)
        train = only(CHAIN, "train", 3).labels
        assert np.nanmean(train[HIGH]) == pytest.approx(0.5, abs=0.01)

    def test_amounts_are_scaled_by_the_training_rows(self):
        train = only(CHAIN, "train").labels
        amount, dollars = train[rand_hie.AMOUNT], train[rand_hie.DOLLARS]
        assert np.nanmean(amount) == pytest.approx(0, abs=1e-5)
        assert np.nanstd(amount) == pytest.approx(1, abs=1e-5)
        assert dollars.mean() == pytest.approx(1, abs=1e-5)
        test = only(CHAIN, "test").labels[rand_hie.AMOUNT]
        assert abs(np.nanmean(test)) > 1e-4

    def test_people_are_in_one_part(self):
        groups = [set(only(CHAIN, p, 1).groups) for p in ("train", "test")]
        assert not groups[0] & groups[1]
        assert not np.array_equal(
            only(CHAIN, "test", 1).groups, only(CHAIN, "test", 2).groups
        )

    def test_fewer_labels(self):
        few = RandHiePair("few", True, Shape(4), label_share=0.3, high_share=0.1)
        all_, some = only(CHAIN, "train"), only(few, "train")
        assert len(some) == pytest.approx(0.3 * len(all_), rel=0.1)
        known = np.isfinite(some.labels[HIGH]).sum()
        assert known == pytest.approx(0.1 * 0.78 * len(some), rel=0.3)
        # By person, and in the training part alone.
        assert set(some.groups) < set(all_.groups)
        assert np.array_equal(only(few, "test").groups, only(CHAIN, "test").groups)

    def test_problems(self):
        assert CHAIN.problem.first == rand_hie.SPEND
        amounts = RandHie("amounts", False, Shape(4)).problem
        assert [goal.name for goal in amounts.goals] == ["spend", "amount", "dollars"]
        pair = RandHiePair("pair", True, Shape(4)).problem
        assert [goal.name for goal in pair.goals] == ["spend", HIGH]
        assert CHAIN.columns().vocabulary == (("plan", 20), ("site", 7), ("year", 6))

    def test_identity(self):
        found = CHAIN.identity()
        assert found["name"] == "chain"
        assert len(found["rows"]) == 16


class TestSimulated:
    def test_columns(self):
        chain = SimulatedChain("a", Impressions(rows=100, users=9), Shape(4))
        assert set(only(chain, "train").features) == set(chain.columns().numbers)
        tasks = SimulatedTasks("b", Tasks(rows=100, features=8), Shape(4))
        columns = tasks.columns()
        names = {*columns.numbers, *(name for name, _ in columns.vocabulary)}
        assert set(only(tasks, "train").features) == names
        assert [goal.name for goal in tasks.problem.goals] == ["task_0", "task_1"]
        assert chain.identity()["settings"]["rows"] == 100
        assert tasks.identity()["name"] == "b"


class TestFiles:
    @pytest.mark.parametrize("name", click_logs.NAMES)
    def test_parts(self, name, tmp_path):
        click_logs.write(name, tmp_path, rows=120)
        source = Files(name, tmp_path, Shape(4), max_buckets=16)
        columns = source.columns()
        for part in ("train", "validation", "test"):
            batches = list(source.parts(part, 0))
            assert batches
            for batch in batches:
                for column in columns.numbers:
                    assert np.isfinite(batch.features[column]).all()
                for column, size in columns.vocabulary:
                    codes = batch.features[column]
                    assert codes.dtype == np.int32
                    assert 0 <= codes.min() <= codes.max() < size <= 16, column
                clicks, conversions = (
                    batch.labels[label] for label in ("click", "conversion")
                )
                assert np.array_equal(np.isnan(conversions), clicks == 0)

    @pytest.mark.parametrize("name", ["ali_ccp", "aliexpress"])
    def test_validation_groups_are_held_out(self, name, tmp_path):
        click_logs.write(name, tmp_path, rows=120)
        source = Files(name, tmp_path, Shape(4), max_buckets=16)
        train, validation = (
            {g for batch in source.parts(part, 0) for g in batch.groups}
            for part in ("train", "validation")
        )
        assert train
        assert validation
        assert not train & validation

    def test_max_rows(self, tmp_path):
        click_logs.write("kuairand", tmp_path, rows=50)
        source = Files("kuairand", tmp_path, Shape(4), max_rows=7)
        assert sum(map(len, source.parts("train", 0))) == 7

    def test_identity_has_the_files(self, tmp_path):
        click_logs.write("kuairand", tmp_path, rows=5)
        found = Files("kuairand", tmp_path, Shape(4)).identity()
        names = [name for name, size in found["files"] if size > 0]
        assert "user_features_pure.csv" in names

    def test_no_country(self, tmp_path):
        with pytest.raises(InputError) as caught:
            next(Files("aliexpress", tmp_path, Shape(4)).parts("train", 0))
        assert "must have a folder AliExpress_NL, " in str(caught.value)


def test_held_out_is_a_tenth_of_the_groups():
    groups = np.arange(100_000)
    mask = held_out(groups)
    assert mask.mean() == pytest.approx(0.1, abs=0.01)
    assert np.array_equal(held_out(groups[::-1]), mask[::-1])
    assert held_out(np.array([-1])).shape == (1,)


def test_first_rows():
    def batch(n):
        zeros = np.zeros(n, np.int32)
        return Part({}, {}, zeros, zeros)

    def sizes(limit):
        return [len(b) for b in first_rows([batch(3), batch(3), batch(3)], limit)]

    assert sizes(None) == [3, 3, 3]
    assert sizes(4) == [3, 1]
    assert sizes(3) == [3]
    assert sizes(20) == [3, 3, 3]
