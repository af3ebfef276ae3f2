"""The table of versions that a command writes into a page."""

import pytest

from tests.robustness import versions
from tests.robustness.results import Tried

LINE = Tried(
    "Python 3.12.1, Keras 3.12.0, TensorFlow 2.18.0, NumPy 2.0.0", 1200, 1199, "pass"
)
ROW = "| 3.12.1 | 3.12.0 | 2.18.0 | 2.0.0 | 1,199 of 1,200 |"


def test_the_table_is_replaced_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{versions.BEGIN}\nold\n{versions.END}\n\nafter\n")
    for _ in range(2):
        versions.write_table(page, [LINE])
    text = page.read_text()
    assert text.startswith(f"before\n\n{versions.BEGIN}\n| Python |")
    assert text.endswith(f"{ROW}\n{versions.END}\n\nafter\n")
    assert "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"page\.md must have the lines"):
        versions.write_table(page, [LINE])


def test_the_page_has_the_markers():
    text = versions.PAGE.read_text()
    assert text.index(versions.BEGIN) < text.index(versions.END)


def test_a_report_of_pytest_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='a' name='b'/>"
        "<testcase classname='a' name='c'><skipped/></testcase>"
        "<testcase classname='a' name='d'><failure/></testcase>"
        "</testsuite></testsuites>"
    )
    line = versions.summary("Python 3", report)
    assert (line.cases, line.survived) == (2, 1)
    assert line.note == "1 skipped; failed: a::d"
    assert versions.summary("Python 3", tmp_path / "none").survived == 0


def test_lower_bounds_are_those_of_the_project():
    bounds = versions.lower_bounds()
    assert set(bounds) == set(versions.PINNED)
    assert bounds["keras"] >= (3, 12)
