"""Tables of results: a row per metric, a column per model, mean ± std. deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table


def results_table(
    title: str,
    results: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Mapping[str, str],
) -> Table:
    """Return one table of all results.

    Args:
        title: title of the table.
        results: maps each model to its metrics, one mapping per seed.
        metrics: maps each metric to the label of its row. A model without the metric
            shows a dash.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for model in results:
        table.add_column(model, justify="right")
    for metric, label in metrics.items():
        table.add_row(label, *(summary(runs, metric) for runs in results.values()))
    return table


def summary(runs: Sequence[Mapping[str, float]], metric: str) -> str:
    """Return "mean ± standard deviation" over runs, or the value of a single run."""
    values = [run[metric] for run in runs if metric in run]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
