"""Inputs and labels: no leakage, encoders fitted on training rows, a fixed split."""

import numpy as np
import pandas as pd
import pytest

from recsys_examples.census_income import features
from recsys_examples.census_income.columns import CATEGORIES, EDUCATION, MARITAL_STATUS
from recsys_examples.census_income.data import Census, load_census
from recsys_examples.census_income.features import (
    COLLEGE,
    GROUPS,
    MIN_CATEGORY_ROWS,
    Encoder,
    make_labels,
    make_splits,
    split_in_half,
)
from recsys_examples.errors import InputError
from tests.support import census_files


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    folder = census_files.write_official(
        tmp_path_factory.mktemp("census"),
        census_files.make_rows(400, 1),
        census_files.make_rows(101, 2),
    )
    return load_census(folder)


@pytest.fixture(scope="module")
def splits(census):
    return make_splits(census)


class TestLeak:
    def test_columns(self, census):
        columns = Encoder(census.train).columns
        assert len(columns) == 42 - 4
        for name in ("education", "marital stat", "label", "weight"):
            assert name not in columns

    def test_inputs_do_not_depend_on_excluded_columns(self, census, splits):
        """Shuffled education, marital status, income and weight: the same inputs."""
        rng = np.random.default_rng(0)
        shuffled = {
            part: frame.assign(
                **{
                    name: rng.permutation(frame[name].to_numpy())
                    for name in features.NOT_INPUTS
                }
            )
            for part, frame in (("train", census.train), ("test", census.test))
        }
        other = make_splits(Census(**shuffled, name=""))
        for part in ("train", "validation", "test"):
            ours, theirs = getattr(splits, part), getattr(other, part)
            assert np.array_equal(ours.codes, theirs.codes)
            assert np.array_equal(ours.numbers, theirs.numbers)
            assert not np.array_equal(
                ours.labels["education"], theirs.labels["education"]
            )


class TestLabels:
    def test_by_hand(self):
        frame = pd.DataFrame(
            {
                "label": ["- 50000.", "50000+.", "- 50000."],
                EDUCATION: [
                    "Some college but no degree",
                    "Associates degree-academic program",
                    "Doctorate degree(PhD EdD)",
                ],
                MARITAL_STATUS: ["Never married", "Divorced", "Separated"],
            }
        )
        labels = make_labels(frame)
        assert labels["income"].tolist() == [0, 1, 0]
        assert labels["education"].tolist() == [0, 1, 1]
        assert labels["never_married"].tolist() == [1, 0, 0]
        assert labels["income"].dtype == np.float32

    def test_degrees_are_documented(self):
        assert set(COLLEGE) < CATEGORIES[EDUCATION]

    def test_groups(self):
        assert GROUPS["income"].tasks == ("income", "never_married")
        assert GROUPS["education"].tasks == ("education", "never_married")
        assert [group.number for group in GROUPS.values()] == [1, 2]


class TestSplit:
    def test_halves(self):
        first, second = split_in_half(101, 0)
        assert (len(first), len(second)) == (50, 51)
        assert sorted([*first, *second]) == list(range(101))

    def test_fixed(self):
        assert np.array_equal(split_in_half(101, 0)[0], split_in_half(101, 0)[0])
        assert not np.array_equal(split_in_half(101, 0)[0], split_in_half(101, 1)[0])
        # Fixed values: results of different splits are not comparable.
        assert split_in_half(10, 0)[0].tolist() == [2, 3, 4, 6, 7]

    def test_rows_keep_their_labels(self, census, splits):
        rows, _ = split_in_half(len(census.test), features.SPLIT_SEED)
        whole = make_labels(census.test)
        for task, label in splits.validation.labels.items():
            assert np.array_equal(label, whole[task][rows])
        assert len(splits.validation) + len(splits.test) == 101


class TestEncoder:
    def frame(self, **columns):
        rows = len(next(iter(columns.values())))
        labels = {
            "label": ["- 50000."] * rows,
            EDUCATION: ["Children"] * rows,
            MARITAL_STATUS: ["Divorced"] * rows,
        }
        return pd.DataFrame({**columns, **labels})

    def test_categories_by_hand(self):
        enough = MIN_CATEGORY_ROWS
        train = self.frame(
            race=["White"] * enough + ["Black"] * enough + ["Other"] * (enough - 1),
            sex=["Male"] * enough + ["Female"] * (2 * enough - 1),
        )
        encoder = Encoder(train)
        # 0 unseen, 1 Black, 2 White; then 3 unseen, 4 Female, 5 Male.
        assert encoder.table_rows == 6
        test = self.frame(
            race=["White", "Black", "Other", "Amer Indian Aleut or Eskimo"],
            sex=["Male", "Female", "Male", "Male"],
        )
        assert encoder.encode(test).codes.tolist() == [[2, 5], [1, 4], [0, 5], [0, 5]]

    def test_quantiles_by_hand(self):
        """80 positive values give 4 quantiles of 20; zeros are separate."""
        values = np.concatenate([np.zeros(20), np.repeat([1.0, 2.0, 5.0, 9.0], 20)])
        encoder = Encoder(self.frame(age=values))
        # np.quantile at 0, 1/4, 1/2, 3/4: 1, 1.75, 3.5, 6.
        test = self.frame(age=[0.0, 0.5, 1.0, 1.7, 1.8, 3.4, 3.5, 5.9, 6.0, 100.0])
        codes = encoder.encode(test).codes[:, 0]
        assert codes.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert encoder.table_rows == 6

    def test_numbers_are_standardised_by_the_training_rows(self):
        train = self.frame(age=[0.0, 2.0], **{"capital gains": [7.0, 7.0]})
        numbers = Encoder(train).encode(train).numbers
        # age, capital gains, and both on a log scale; a constant column is 0.
        expected = [[-1, 0, -1, 0], [1, 0, 1, 0]]
        np.testing.assert_allclose(numbers, expected, atol=1e-6)
        far = Encoder(train).encode(
            self.frame(age=[5.0, 1.0], **{"capital gains": [9.0, 7.0]})
        )
        np.testing.assert_allclose(far.numbers[:, :2], [[4, 2], [0, 0]], atol=1e-6)

    def test_columns_have_disjoint_indices(self, splits):
        codes = splits.train.codes
        assert codes.shape == (400, 38)
        assert (codes.min(axis=0)[1:] > codes.max(axis=0)[:-1]).all()
        assert codes.min() >= 0
        assert codes.max() < splits.table_rows
        assert splits.train.numbers.shape == (400, 14)
        assert splits.train.numbers.dtype == np.float32

    def test_encoder_does_not_use_test_rows(self, census, splits):
        """With half of the test rows the training rows are encoded the same."""
        other = make_splits(Census(census.train, census.test[:50], ""))
        assert np.array_equal(other.train.codes, splits.train.codes)
        assert np.array_equal(other.train.numbers, splits.train.numbers)
        assert other.table_rows == splits.table_rows


def test_labels_of_one_class(census):
    poor = census.test.assign(label="- 50000.")
    message = "tiny: the 50 validation rows must have both classes of income"
    with pytest.raises(InputError, match=message):
        make_splits(Census(census.train, poor, "tiny"))


def test_the_fingerprint_depends_on_the_data(census, splits):
    assert make_splits(census).fingerprint() == splits.fingerprint()
    assert make_splits(census, seed=1).fingerprint() != splits.fingerprint()
