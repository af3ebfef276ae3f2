"""The record and the page of a study whose results are tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from recsys_examples.files import RECORD
from recsys_examples.runs import write_json


def write_study_report(
    folder: Path,
    title: str,
    tables: Sequence[Table],
    findings: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write `metrics.json` and `report.html`, with the pictures of the folder.

    Args:
        folder: an existing folder.
        title: title of the page.
        tables: the tables that the command prints.
        findings: the lines that it prints below them.
        settings: JSON object, what the results depend on.

    Raises:
        InputError: if a file cannot be written.
    """
    from keras_moe import report

    record = {
        "tables": [_as_json(table) for table in tables],
        "findings": list(findings),
        **settings,
    }
    write_json(folder / RECORD, record)
    report(folder, title=title)


def _as_json(table: Table) -> dict[str, Any]:
    columns = [list(column.cells) for column in table.columns]
    return {
        "title": str(table.title),
        "columns": [str(column.header) for column in table.columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
    }
