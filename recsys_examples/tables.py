"""Tables of results: models down, metrics across, mean ± standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table


def results_table(
    title: str,
    results: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Mapping[str, str],
) -> Table:
    """Make one table of all results.

    Args:
        title: above the table.
        results: by model, the metrics of each seed.
        columns: by metric, its heading. A model without the metric shows a dash.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for model, runs in results.items():
        table.add_row(model, *(summary(runs, metric) for metric in columns))
    return table


def summary(runs: Sequence[Mapping[str, float]], metric: str) -> str:
    """Return "mean ± standard deviation" over runs, or the value of a single one."""
    values = [run[metric] for run in runs if metric in run]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
