"""Batches of lines and numbers, and AliExpress: values by hand, every error."""

import itertools
import tracemalloc

import numpy as np
import pytest

from recsys_examples.click_conversion import streams
from recsys_examples.click_conversion.aliexpress import (
    CATEGORIES,
    COUNTRIES,
    NUMBERS,
    read_aliexpress,
)
from recsys_examples.errors import InputError

HEADER = ["search_id", *CATEGORIES, *NUMBERS, "click", "conversion"]


def row(i=0, **values):
    """A row as in the published files; categories i, i + 1, ..., numbers i / 10."""
    found = {"search_id": str(100 + i // 2), "click": "0", "conversion": "0"}
    found |= {name: str(i + k) for k, name in enumerate(CATEGORIES)}
    found |= {name: str(i / 10) for name in NUMBERS}
    return found | values


def write(path, rows, header=HEADER):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(r[name] for name in header) for r in rows]
    path.write_text("\n".join([",".join(header), *lines]) + "\n")


def fault(reader):
    with pytest.raises(InputError) as caught:
        list(reader)
    message = str(caught.value)
    assert "\n" not in message
    return message


CLICKS = [
    row(0),
    row(1, click="1"),
    row(2, click="1", conversion="1"),
    row(3),
    row(4, categorical_2="-1", categorical_3="7.0"),
]


class TestAliExpress:
    def test_values(self, tmp_path):
        write(tmp_path / "AliExpress_NL" / "train.csv", CLICKS)
        (batch,) = read_aliexpress(tmp_path, "train", ["NL"])
        assert list(batch.features) == [*CATEGORIES, *NUMBERS]
        # Index 1 + code, and 0 for a negative code.
        assert batch.features["categorical_1"].tolist() == [1, 2, 3, 4, 5]
        assert batch.features["categorical_2"].tolist() == [2, 3, 4, 5, 0]
        assert batch.features["categorical_3"].tolist() == [3, 4, 5, 6, 8]
        assert batch.features["categorical_1"].dtype == np.int32
        np.testing.assert_allclose(
            batch.features["numerical_63"], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6
        )
        assert batch.features["numerical_1"].dtype == np.float32
        assert batch.labels["click"].tolist() == [0, 1, 1, 0, 0]
        np.testing.assert_array_equal(
            batch.labels["conversion"], [np.nan, 0, 1, np.nan, np.nan]
        )
        assert batch.labels["conversion"].dtype == np.float32
        assert batch.groups.tolist() == [100, 100, 101, 101, 102]
        assert batch.scenario.tolist() == [0] * 5

    def test_buckets(self, tmp_path):
        write(tmp_path / "train.csv", CLICKS)
        (batch,) = read_aliexpress(
            tmp_path, "train", ["NL"], buckets={"categorical_1": 4}
        )
        # 1 + code % 3 for the codes 0 to 4
        assert batch.features["categorical_1"].tolist() == [1, 2, 3, 1, 2]

    def test_countries_take_turns(self, tmp_path):
        for country, rows in (("NL", 5), ("ES", 2), ("FR", 3), ("US", 1)):
            name = f"AliExpress_{country}" if country != "FR" else country
            write(tmp_path / name / "test.csv", [row(i) for i in range(rows)])
        batches = list(read_aliexpress(tmp_path, "test", batch_size=2))
        found = [(COUNTRIES[b.scenario[0]], len(b)) for b in batches]
        assert found == [
            *[("NL", 2), ("ES", 2), ("FR", 2), ("US", 1)],
            *[("NL", 2), ("FR", 1)],
            ("NL", 1),
        ]
        one = list(read_aliexpress(tmp_path, "test", ["US", "ES"]))
        assert [b.scenario[0] for b in one] == [3, 1]

    def test_the_order_of_columns_and_further_ones(self, tmp_path):
        header = ["note", *reversed(HEADER)]
        write(tmp_path / "train.csv", [r | {"note": "x"} for r in CLICKS], header)
        (batch,) = read_aliexpress(tmp_path, "train", ["NL"])
        assert batch.features["categorical_1"].tolist() == [1, 2, 3, 4, 5]

    def test_unclicked_conversions(self, tmp_path):
        rows = [*CLICKS[:3], row(3, conversion="1"), row(4)]
        write(tmp_path / "train.csv", rows)
        assert fault(read_aliexpress(tmp_path, "train", ["NL"])) == (
            f"{tmp_path / 'train.csv'}, line 5: a conversion must have a click; got "
            "conversion 1 with click 0 (on_unclicked='drop' skips such rows)"
        )
        batches = read_aliexpress(
            tmp_path, "train", ["NL"], batch_size=1, on_unclicked="drop"
        )
        assert [b.groups[0] for b in batches] == [100, 100, 101, 102]

    def test_blank_lines_and_line_ends(self, tmp_path):
        write(tmp_path / "train.csv", CLICKS)
        path = tmp_path / "train.csv"
        text = "\ufeff" + path.read_text().replace("\n", "\r\n\r\n")
        path.write_text(text, newline="")
        (batch,) = read_aliexpress(tmp_path, "train", ["NL"])
        assert len(batch) == 5


class TestAliExpressFaults:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"click": "2"}, "column 'click': must be 0 or 1; got 2"),
            ({"click": "0.5"}, "column 'click': must be 0 or 1; got 0.5"),
            ({"conversion": "-1"}, "column 'conversion': must be 0 or 1; got -1"),
            (
                {"categorical_3": "1.5"},
                "column 'categorical_3': must be a whole number; got 1.5",
            ),
            (
                {"search_id": "1e300"},
                "column 'search_id': must be a whole number; got 1e+300",
            ),
            (
                {"numerical_5": "x"},
                "column 'numerical_5': must be a finite number; got 'x'",
            ),
            (
                {"numerical_5": ""},
                "column 'numerical_5': must be a finite number; got ''",
            ),
            (
                {"numerical_5": "nan"},
                "column 'numerical_5': must be a finite number; got 'nan'",
            ),
            ({"numerical_5": "1,2"}, "a row must have 82 values; got 83"),
        ],
    )
    @pytest.mark.parametrize("batch_size", [2, 100])
    def test_values(self, tmp_path, values, message, batch_size):
        write(tmp_path / "train.csv", [*CLICKS[:3], row(3, **values), row(4)])
        found = fault(read_aliexpress(tmp_path, "train", ["NL"], batch_size))
        assert found == f"{tmp_path / 'train.csv'}, line 5" + (
            f": {message}" if message.startswith("a row") else f", {message}"
        )

    def test_digits_that_only_python_reads(self, tmp_path):
        write(tmp_path / "train.csv", [row(0), row(1, numerical_1="1_000")])
        assert "lines 2 to 3: must be numbers of digits" in fault(
            read_aliexpress(tmp_path, "train", ["NL"])
        )

    @pytest.mark.parametrize("name", ["search_id", "categorical_16", "conversion"])
    def test_a_column_is_missing(self, tmp_path, name):
        write(tmp_path / "test.csv", CLICKS, [n for n in HEADER if n != name])
        assert fault(read_aliexpress(tmp_path, "test", ["ES"])).endswith(
            f"test.csv, line 1, column {name!r}: missing"
        )

    def test_a_column_twice(self, tmp_path):
        write(tmp_path / "test.csv", CLICKS, [*HEADER, "click"])
        assert "line 1, column 'click': duplicate column" in fault(
            read_aliexpress(tmp_path, "test", ["ES"])
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "line 1: empty; a header must name the columns"),
            ("\n", "line 1: empty; a header must name the columns"),
            (",".join(HEADER), ": the file has no rows"),
        ],
    )
    def test_no_rows(self, tmp_path, text, message):
        (tmp_path / "train.csv").write_text(text)
        assert message in fault(read_aliexpress(tmp_path, "train", ["NL"]))

    def test_no_file(self, tmp_path):
        write(tmp_path / "NL" / "train.csv", CLICKS)
        with pytest.raises(InputError, match=r"no train.csv of AliExpress ES; looked"):
            read_aliexpress(tmp_path, "train")

    def test_not_utf8(self, tmp_path):
        write(tmp_path / "train.csv", CLICKS)
        path = tmp_path / "train.csv"
        path.write_bytes(path.read_bytes() + b"\xff\n")
        assert "line 7: the text must be UTF-8; got the byte 0xff" in fault(
            read_aliexpress(tmp_path, "train", ["NL"])
        )

    def test_a_line_too_long(self, tmp_path, monkeypatch):
        write(tmp_path / "train.csv", CLICKS)
        monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2000)
        path = tmp_path / "train.csv"
        path.write_text(path.read_text() + "1" * 2500)
        assert "line 7: a line must have fewer than 2000 bytes" in fault(
            read_aliexpress(tmp_path, "train", ["NL"])
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "validation"}, r"split must be one of \['train', 'test'\]"),
            ({"countries": ["RU"]}, "countries must be one of .* got 'RU'"),
            ({"countries": []}, "countries must be different, at least one"),
            ({"countries": ["NL", "NL"]}, "countries must be different"),
            ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
            ({"buckets": {"x": 9}}, "a column of buckets must be one of .* got 'x'"),
            ({"buckets": {"categorical_1": 1}}, "must be at least 2; got 1"),
            ({"on_unclicked": "keep"}, "on_unclicked must be one of .* got 'keep'"),
        ],
    )
    def test_arguments(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            read_aliexpress(tmp_path, **{"split": "train", **arguments})


def test_memory_does_not_depend_on_the_size_of_the_file(tmp_path):
    path = tmp_path / "train.csv"
    lines = [",".join(row(i, search_id=str(i))[n] for n in HEADER) for i in range(100)]
    with path.open("w") as file:
        file.write(",".join(HEADER) + "\n")
        for _ in range(200):
            file.write("\n".join(lines) + "\n")
    bound = 1_500_000
    assert path.stat().st_size > 4 * bound
    reader = read_aliexpress(tmp_path, "train", ["NL"], batch_size=200)
    next(reader)  # imports and caches
    tracemalloc.start()
    try:
        rows = sum(len(batch) for batch in reader)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 20_000 - 200
    assert peak < bound


class TestBucket:
    @pytest.mark.parametrize(
        ("text", "index"),
        [("", 0), ("  ", 0), ("0", 1), ("6", 7), ("7", 1), ("3.0", 4), (" 2 ", 3)],
    )
    def test_by_hand(self, text, index):
        # 8 buckets: 0 for empty texts, 1 + n % 7 for numbers.
        assert streams.bucket(text, 8) == index

    def test_texts(self):
        assert streams.number_of("a") == 0xE8B7BE43  # its CRC-32
        assert streams.number_of("-124") > 124
        indices = {streams.bucket(f"text{i}", 1000) for i in range(100)}
        assert len(indices) > 80
        assert min(indices) >= 1
        assert max(indices) < 1000

    def test_long_numbers_are_hashed(self):
        assert streams.number_of("9" * 18) == 10**18 - 1
        assert streams.number_of("9" * 30) < 2**32

    def test_ids_do_not_collide(self):
        indices = [streams.bucket(str(10**9 + i), 50) for i in range(49)]
        assert sorted(indices) == list(range(1, 50))


def test_batches_are_lazy(tmp_path):
    write(tmp_path / "train.csv", [*CLICKS, row(9, click="2")])
    reader = read_aliexpress(tmp_path, "train", ["NL"], batch_size=2)
    assert len(list(itertools.islice(reader, 2))) == 2
    assert "line 7, column 'click'" in fault(reader)
