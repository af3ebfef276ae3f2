"""Tables of results."""

import io

import pytest
from rich.console import Console

from recsys_examples.tables import results_table, summary


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "-"),
        ([0.12345], "0.1235"),
        # The mean is 2; the deviations 1, 0, 1 give sqrt(2 / (3 - 1)) = 1.
        ([1.0, 2.0, 3.0], "2.0000 ± 1.0000"),
    ],
)
def test_summary(values, expected):
    assert summary([{"a": value, "b": 9.0} for value in values], "a") == expected


def test_runs_without_the_metric_do_not_count():
    assert summary([{"b": 1.0}, {"a": 2.0}], "a") == "2.0000"


def test_table():
    results = {"MMoE": [{"x": 1.0, "y": 0.5}], "popularity": [{"x": 0.25}]}
    table = results_table("A title", results, {"x": "first", "y": "second"})
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert lines[0].strip() == "A title"
    assert ["first", "1.0000", "0.2500"] in cells
    assert ["second", "0.5000", "-"] in cells
    (heading,) = (line for line in lines if "MMoE" in line)
    assert heading.index("MMoE") < heading.index("popularity")
