"""Tables of our results and of the paper's, and the comparison with the baselines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from recsys_examples.census_income.features import GROUPS
from recsys_examples.census_income.models import expert_units
from recsys_examples.census_income.names import BASELINES, EQUAL_BOTTOM, SINGLE_TASK
from recsys_examples.census_income.papers import REPORTED, SOURCE
from recsys_examples.census_income.study import Found, best_layer
from recsys_examples.comparison import (
    GAIN,
    LEVEL,
    MIN_WILCOXON_PAIRS,
    compare,
)
from recsys_examples.tables import summary

TITLES = {
    "income": "income over $50K",
    "education": "education at least college",
    "never_married": "never married",
}


def found_table(group: str, table: Mapping[str, Found], where: str) -> Table:
    """Return the table of one group.

    Args:
        group: one of `features.GROUPS`.
        table: maps each model to its results.
        where: description of the files and columns.
    """
    main, auxiliary = GROUPS[group].tasks
    made = Table(
        title=f"Group {GROUPS[group].number}, test AUC, mean ± standard deviation; "
        f"{where}",
        title_justify="left",
    )
    made.add_column("")
    for heading in (
        f"{TITLES[main]} (main)",
        f"{TITLES[main]}, best run",
        TITLES[auxiliary],
        f"{TITLES[auxiliary]}, best run",
        "validation (main)",
        "runs",
        "units",
        "parameters",
        "s per run",
    ):
        made.add_column(heading, justify="right")
    for model, found in table.items():
        made.add_row(
            model,
            *_mean_and_best(found, main),
            *_mean_and_best(found, auxiliary),
            f"{found.validation(main):.4f}",
            str(len(found.outcomes)),
            str(expert_units(model, found.settings)),
            f"{found.outcomes[0].parameters:,}",
            f"{np.mean([outcome.seconds for outcome in found.outcomes]):.0f}",
        )
    return made


def _mean_and_best(found: Found, task: str) -> tuple[str, str]:
    return (
        summary([outcome.test for outcome in found.outcomes], task),
        f"{max(found.test(task)):.4f}",
    )


def papers_table(group: str) -> Table:
    """Return the table of the paper's results for a group."""
    main, auxiliary = GROUPS[group].tasks
    made = Table(
        title=f"Group {GROUPS[group].number} in the paper, with other columns and "
        f"another budget; {SOURCE}",
        title_justify="left",
    )
    made.add_column("")
    for heading in (
        f"{TITLES[main]} (main): mean",
        "best",
        f"{TITLES[auxiliary]}: mean",
        "in the best run of the main task",
    ):
        made.add_column(heading, justify="right")
    for model, reported in REPORTED[group].items():
        made.add_row(
            model,
            f"{reported.main_mean:.4f}",
            f"{reported.main_best:.4f}",
            f"{reported.auxiliary_mean:.4f}",
            f"{reported.auxiliary_of_best:.4f}",
        )
    return made


def verdict(group: str, table: Mapping[str, Found]) -> list[str]:
    """Compare the best layer with the baselines by paired tests; return lines."""
    main = GROUPS[group].main
    best = best_layer(table, main)
    baselines = [model for model in BASELINES if model in table]
    if best is None or not baselines:
        return []
    chosen = ", ".join(f"{k}={v}" for k, v in vars(table[best].settings).items())
    lines = [f"Best layer on validation: {best} with {chosen}"]
    if len(table[best].outcomes) < 2:
        return [*lines, "A paired test needs two or more seeds; got 1."]
    held = {}
    for model in baselines:
        result = compare(table[best].test(main), table[model].test(main))
        held[model] = result.holds
        seeds = len(table[best].outcomes)
        tests = f"paired t-test p = {result.t_test:.2g}"
        if seeds >= MIN_WILCOXON_PAIRS:
            tests += f", Wilcoxon p = {result.wilcoxon:.2g}"
        lines.append(
            f"{best} minus {model}: {result.mean:+.5f} ± {result.deviation:.5f}, "
            f"better in {result.better:.0%} of {seeds} seeds; {tests}"
        )
    if {SINGLE_TASK, EQUAL_BOTTOM} <= held.keys():
        reached = held[SINGLE_TASK] and held[EQUAL_BOTTOM]
        lines.append(
            f"Better than {SINGLE_TASK} and {EQUAL_BOTTOM} by {GAIN} with p < {LEVEL}: "
            f"{'yes' if reached else 'no'}"
        )
    return lines
