"""Reading Census-Income: both formats; errors name the file, line and column."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest

from recsys_examples.census_income.columns import (
    CATEGORIES,
    INCOMES,
    LABEL,
    NUMBERS,
    OFFICIAL,
    OPTIONAL,
)
from recsys_examples.census_income.data import DATA_VARIABLE, load_census
from recsys_examples.errors import InputError
from tests.support import census_files

TRAIN, TEST = census_files.make_rows(30, 1), census_files.make_rows(20, 2)

# census-income.names: "distinct values for attribute" of the train file; "?" is one of
# them where it occurs.
DISTINCT = {
    "class of worker": 9,
    "detailed industry recode": 52,
    "detailed occupation recode": 47,
    "education": 17,
    "enroll in edu inst last wk": 3,
    "marital stat": 7,
    "major industry code": 24,
    "major occupation code": 15,
    "race": 5,
    "hispanic origin": 10,
    "sex": 2,
    "member of a labor union": 3,
    "reason for unemployment": 6,
    "full or part time employment stat": 8,
    "tax filer stat": 6,
    "region of previous residence": 6,
    "state of previous residence": 51,
    "detailed household and family stat": 38,
    "detailed household summary in household": 8,
    "migration code-change in msa": 10,
    "migration code-change in reg": 9,
    "migration code-move within reg": 10,
    "live in this house 1 year ago": 3,
    "migration prev res in sunbelt": 4,
    "family members under 18": 5,
    "country of birth father": 43,
    "country of birth mother": 43,
    "country of birth self": 43,
    "citizenship": 5,
    "own business or self employed": 3,
    "fill inc questionnaire for veteran's admin": 3,
    "veterans benefits": 3,
    "year": 2,
}


def test_the_documented_columns():
    assert {name: len(known) for name, known in CATEGORIES.items()} == DISTINCT
    assert len(OFFICIAL) == 42
    assert sorted(OFFICIAL) == sorted([*CATEGORIES, *NUMBERS, LABEL])
    assert set(OPTIONAL) < set(CATEGORIES)
    assert len(census_files.CUT) == 34


class TestFormats:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_official(self, tmp_path, zipped):
        census_files.write_official(tmp_path, TRAIN, TEST, zipped)
        census = load_census(tmp_path)
        assert census.columns == list(OFFICIAL)
        assert census.name == "official files"
        self.check(census, OFFICIAL)

    @pytest.mark.parametrize("zipped", [False, True])
    def test_cut(self, tmp_path, zipped):
        census_files.write_cut(tmp_path, TRAIN, TEST, zipped)
        census = load_census(tmp_path)
        assert census.columns == census_files.CUT
        assert census.name == "files with a header"
        self.check(census, census_files.CUT)

    def check(self, census, columns):
        for frame, rows in ((census.train, TRAIN), (census.test, TEST)):
            assert len(frame) == len(rows)
            for name in columns:
                expected = [row[name] for row in rows]
                if name in NUMBERS:
                    expected = [float(value) for value in expected]
                assert frame[name].tolist() == expected, name

    def test_blanks_question_marks_and_na(self, tmp_path):
        row = {
            **TRAIN[0],
            "major occupation code": "Handlers equip cleaners etc",
            "citizenship": "Foreign born- Not a citizen of U S",
            "hispanic origin": "NA",
            "country of birth self": "?",
        }
        text = census_files.official_text([row])
        assert "etc ," in text
        assert "U S ," in text
        census_files.write_official(tmp_path, [], TEST)
        (tmp_path / "census-income.data").write_text("\n" + text + "\n\n")
        train = load_census(tmp_path).train
        assert len(train) == 1
        for name in row:
            expected = float(row[name]) if name in NUMBERS else row[name]
            assert train[name][0] == expected

    def test_the_header_may_have_another_order_and_further_columns(self, tmp_path):
        names = [*reversed(census_files.CUT), OPTIONAL[0]]
        for name, rows in (("train.csv", TRAIN), ("test.csv", TEST)):
            census_files.write(tmp_path / name, census_files.cut_text(rows, names))
        census = load_census(tmp_path)
        assert set(census.columns) == set(names)
        self.check(census, census.columns)

    def test_the_official_files_take_precedence(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        census_files.write_official(tmp_path, TRAIN, TEST)
        assert len(load_census(tmp_path).columns) == 42

    def test_a_single_official_file_is_ignored_beside_a_pair(self, tmp_path):
        census_files.write_official(tmp_path, TRAIN, TEST)
        (tmp_path / "census-income.data").unlink()
        census_files.write_cut(tmp_path, TRAIN, TEST)
        assert len(load_census(tmp_path).columns) == 34

    def test_subfolder_and_environment(self, tmp_path, monkeypatch):
        census_files.write_cut(tmp_path / "census-income", TRAIN, TEST)
        assert len(load_census(tmp_path).train) == 30
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        assert len(load_census().train) == 30


def fault(folder):
    """The error message, without the path of the folder."""
    with pytest.raises(InputError) as caught:
        load_census(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(f"{folder}{os.sep}", "")


def test_no_folder(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(InputError, match=f"set --data-dir.*{DATA_VARIABLE}"):
        load_census()


class TestFolderFaults:
    def test_not_there(self, tmp_path):
        with pytest.raises(InputError, match="nowhere: the data folder does not exist"):
            load_census(tmp_path / "nowhere")

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="must be a folder; got a file"):
            load_census(tmp_path / "file")

    def test_empty(self, tmp_path):
        assert "no Census-Income files; looked for" in fault(tmp_path)

    @pytest.mark.parametrize("lost", ["train.csv", "test.csv"])
    def test_incomplete_pair(self, tmp_path, lost):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        (tmp_path / lost).unlink()
        (left,) = os.listdir(tmp_path)
        assert fault(tmp_path) == (
            f"{lost}: missing, with or without .gz; required beside {left}"
        )

    def test_not_gzip(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN, TEST, zipped=True)
        (tmp_path / "test.csv.gz").write_bytes(b"no zip")
        assert "cannot be read" in fault(tmp_path)

    def test_truncated_gzip(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN * 50, TEST, zipped=True)
        path = tmp_path / "train.csv.gz"
        path.write_bytes(path.read_bytes()[:-500])
        message = fault(tmp_path)
        assert message.startswith("train.csv.gz: cannot be read")


def changed(**values):
    """The third row with changed values; underscores stand for blanks in names."""
    names = {re.sub(r"\W", "_", name): name for name in OFFICIAL}
    return {**TRAIN[2], **{names[key]: value for key, value in values.items()}}


# Changed values, and the error message after the file and the line.
BAD_VALUES = [
    ({"race": "Martian"}, "column 'race': unknown category 'Martian'"),
    ({"race": "?"}, "column 'race': unknown category '?'"),
    ({"race": ""}, "column 'race': unknown category ''"),
    ({"year": "96"}, "column 'year': unknown category '96'"),
    ({"education": "Primary"}, "column 'education': unknown category 'Primary'"),
    ({"age": "old"}, "column 'age': must be a number >= 0; got 'old'"),
    ({"age": "-1"}, "column 'age': must be a number >= 0; got '-1'"),
    ({"age": "nan"}, "column 'age': must be a number >= 0; got 'nan'"),
    ({"weight": "?"}, "column 'weight': must be a number >= 0; got '?'"),
    (
        {"label": "50000"},
        "column 'label': must be '- 50000.' or '50000+.'; got '50000'",
    ),
    ({"label": "1"}, "column 'label': must be '- 50000.' or '50000+.'; got '1'"),
    ({"label": ""}, "column 'label': must be '- 50000.' or '50000+.'; got ''"),
]


class TestFaultsInAFile:
    @pytest.mark.parametrize(("values", "message"), BAD_VALUES)
    def test_values(self, tmp_path, values, message):
        rows = [*TRAIN[:2], changed(**values), *TRAIN[3:]]
        census_files.write_official(tmp_path / "official", rows, TEST)
        assert fault(tmp_path / "official") == f"census-income.data, line 3, {message}"
        census_files.write_cut(tmp_path / "cut", TRAIN, rows, zipped=True)
        assert fault(tmp_path / "cut") == f"test.csv.gz, line 4, {message}"

    def test_a_column_that_only_the_official_files_have(self, tmp_path):
        rows = [*TRAIN[:2], changed(detailed_industry_recode="52")]
        census_files.write_official(tmp_path, rows, TEST)
        assert fault(tmp_path) == (
            "census-income.data, line 3, column 'detailed industry recode': unknown "
            "category '52'"
        )

    def test_blank_lines_are_counted(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        good = census_files.cut_text(TRAIN[:2])
        bad = census_files.cut_text([changed(age="old")]).splitlines()[1]
        (tmp_path / "train.csv").write_text(good + "\n\n" + bad + "\n")
        assert fault(tmp_path).startswith("train.csv, line 6, column 'age'")

    @pytest.mark.parametrize("line", [1, 3])
    def test_too_few_values(self, tmp_path, line):
        lines = census_files.official_text(TRAIN).splitlines()
        lines[line - 1] = ", ".join(lines[line - 1].split(", ")[:40])
        census_files.write_official(tmp_path, TRAIN, TEST)
        (tmp_path / "census-income.data").write_text("\n".join(lines))
        assert fault(tmp_path) == (
            f"census-income.data, line {line}, column 'year': missing; a row must have "
            "42 values, got 40"
        )

    @pytest.mark.parametrize("line", [1, 3])
    def test_too_many_values(self, tmp_path, line):
        lines = census_files.official_text(TRAIN).splitlines()
        lines[line - 1] += ", 1"
        census_files.write_official(tmp_path, TRAIN, TEST)
        (tmp_path / "census-income.data").write_text("\n".join(lines))
        assert fault(tmp_path) == (
            f"census-income.data, line {line}, after column 'label': a row must have "
            "42 values, got 43"
        )

    @pytest.mark.parametrize("name", ["age", "education", "label", "weight", "year"])
    def test_a_column_is_missing(self, tmp_path, name):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        names = [n for n in census_files.CUT if n != name]
        (tmp_path / "test.csv").write_text(census_files.cut_text(TEST, names))
        assert fault(tmp_path) == f"test.csv, line 1, column {name!r}: missing"

    def test_a_column_of_only_one_file(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        names = [*census_files.CUT, OPTIONAL[0]]
        (tmp_path / "test.csv").write_text(census_files.cut_text(TEST, names))
        assert fault(tmp_path) == (
            f"train.csv, line 1, column {OPTIONAL[0]!r}: missing, but present in "
            "test.csv"
        )

    @pytest.mark.parametrize("text", ["", "\n", "  \n1,2\n"])
    def test_no_header(self, tmp_path, text):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        (tmp_path / "train.csv").write_text(text)
        assert fault(tmp_path) == (
            "train.csv, line 1: empty; a header must name the columns"
        )

    def test_an_unknown_column(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        text = census_files.cut_text(TRAIN).replace("age,", "years,", 1)
        (tmp_path / "train.csv").write_text(text)
        assert fault(tmp_path) == (
            "train.csv, line 1, column 'years': not a column of Census-Income"
        )

    def test_a_column_twice(self, tmp_path):
        census_files.write_cut(tmp_path, TRAIN, TEST)
        text = census_files.cut_text(TRAIN, [*census_files.CUT, "age"])
        (tmp_path / "train.csv").write_text(text)
        assert fault(tmp_path) == ("train.csv, line 1, column 'age': duplicate column")

    @pytest.mark.parametrize("text", ["", "\n\n"])
    def test_no_rows(self, tmp_path, text):
        census_files.write_official(tmp_path, TRAIN, TEST)
        (tmp_path / "census-income.test").write_text(text)
        assert fault(tmp_path) == "census-income.test: the file has no rows"

    def test_invalid_utf8(self, tmp_path):
        census_files.write_official(tmp_path, TRAIN, TEST)
        path = tmp_path / "census-income.data"
        path.write_bytes(path.read_bytes().replace(b"Never married", b"Never \xff", 1))
        assert "column 'marital stat': unknown category 'Never \\\\xff'" in fault(
            tmp_path
        )


def shared_data() -> Path:
    given = os.environ.get(DATA_VARIABLE)
    if not given:
        pytest.skip(f"{DATA_VARIABLE} is not set: no folder with Census-Income")
    for folder in (Path(given), Path(given) / "census-income"):
        if (folder / "census-income.test.gz").is_file():
            return folder
    pytest.skip(f"{given}: no census-income.test.gz here or in census-income")


class TestPublishedFiles:
    def test_the_cut_test_file_has_the_rows_of_the_official_one(self, tmp_path):
        folder = shared_data()
        if not (folder / "train.csv.gz").is_file():
            pytest.skip(f"{folder}: no train.csv.gz")
        # The reader requires a pair of files; the official train file is not at hand.
        for name in ("census-income.data.gz", "census-income.test.gz"):
            (tmp_path / name).symlink_to(folder / "census-income.test.gz")
        official, cut = load_census(tmp_path).test, load_census(folder)
        assert official.shape == (99_762, 42)
        assert cut.train.shape == (199_523, 34)
        for name in cut.columns:
            assert np.array_equal(official[name], cut.test[name]), name
        assert (cut.train[LABEL] == INCOMES[1]).mean() == pytest.approx(0.062, abs=5e-4)

    def test_an_invalid_value_in_the_last_line(self, tmp_path):
        text = gzip.decompress(
            (shared_data() / "census-income.test.gz").read_bytes()
        ).decode()
        lines = text.splitlines()
        lines[-1] = lines[-1].replace(", 9", ", 8")  # at least the year
        census_files.write(tmp_path / "census-income.data", text)
        census_files.write(tmp_path / "census-income.test", "\n".join(lines))
        assert fault(tmp_path).startswith("census-income.test, line 99762, column")
