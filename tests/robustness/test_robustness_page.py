"""The page is made of results, a section for each profile."""

from tests.robustness.__main__ import HEAD, write_page
from tests.robustness.results import Tried, write


def test_other_sections_stay(tmp_path):
    page = tmp_path / "page.md"
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, right in zip(files, (1200, 3), strict=True):
        lines = [Tried("calls", 1200, right, "the same", "some note.")]
        write(
            file, f"profile {file.stem}", "python -m it", [*lines, Tried("", 0, 0, "")]
        )
    write_page(page, files)
    text = page.read_text()
    assert text.startswith(HEAD)
    assert "\n## Profile a\n\n`python -m it`\n\n| tried |" in text
    assert text.count("| calls | 1,200 | 1,200 | the same |") == 1
    assert text.count("- calls: some note.\n") == 2
    assert text.count("\n| calls") + 2 == text.count("\n| ")  # Of no cases: no row.

    write(files[1], "profile b", "python -m it", [Tried("calls", 9, 9, "better")])
    write_page(page, files[1:])
    found = page.read_text()
    at = text.index("\n## Profile b")
    assert found[:at] == text[:at]
    assert "| calls | 9 | 9 | better |" in found[at:]
    assert "1,200" not in found[at:]
    write_page(page, files)
    assert page.read_text() == found
