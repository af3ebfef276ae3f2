"""Tables and verdicts, from the results of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from recsys_examples.click_conversion.problems import Chain
from recsys_examples.click_conversion.settings import (
    BOTTOM,
    ENTIRE_SPACE,
    SINGLE,
)
from recsys_examples.click_conversion.sources import Source
from recsys_examples.click_conversion.study import Study
from recsys_examples.comparison import Comparison, compare
from recsys_examples.tables import results_table

LEVEL = 0.01  # of the paired t-tests
RATE_AUC, RATE_ECE = "rate_auc_all", "rate_ece_all"
# Metrics of which smaller is better, by the end of their names. Of the ratio of
# predicted and observed, 1 is best: it is not tested.
_SMALLER = ("_ece", "_ece_all", "_excess", "_excess_all", "_ne", "_rmse")
_RATIO = ("_pcoc", "_pcoc_all")

# Metrics by model, one mapping per seed.
Found = Mapping[str, Sequence[Mapping[str, float]]]


def found_metrics(study: Study, source: Source) -> dict[str, list[dict[str, float]]]:
    """Return the metrics of test rows by model, in the order of the seeds."""
    return {
        model: [
            {name: value for name, value in outcome.values.items() if value is not None}
            for outcome in study.outcomes(source, model)
        ]
        for model in study.models(source)
    }


def source_tables(study: Study, source: Source) -> list[Table]:
    """Return the tables of a source: values, and differences from the baselines."""
    found = found_metrics(study, source)
    seeds = len(next(iter(found.values())))
    title = f"{source.title}: {seeds} seeds, mean ± standard deviation"
    tables = [results_table(title, found, source.problem.metrics)]
    tables += [
        differences_table(source, found, baseline)
        for baseline in (BOTTOM, SINGLE)
        if baseline in found and len(found) > 1 and seeds > 1
    ]
    return tables


def differences_table(source: Source, found: Found, baseline: str) -> Table:
    """Return the differences of all models from one, with p of a paired t-test."""
    table = Table(
        title=f"{source.title}: minus {baseline}, mean (p of a paired t-test); "
        f"* better and ! worse with p < {LEVEL}",
        title_justify="left",
    )
    table.add_column("")
    others = [model for model in found if model != baseline]
    for model in others:
        table.add_column(model, justify="right")
    for metric, label in source.problem.metrics.items():
        if metric.endswith(_RATIO):
            continue
        cells = [_cell(metric, difference(found, m, baseline, metric)) for m in others]
        table.add_row(label, *cells)
    return table


def settings_table(study: Study, source: Source) -> Table:
    """Return the number of parameters and the chosen settings of each model."""
    table = Table(title=f"{source.title}: chosen settings", title_justify="left")
    for heading in ("", "parameters", "learning rate", "epochs", "s per run"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in study.models(source):
        rate, epochs = study.chosen(source, model)
        outcomes = study.outcomes(source, model)
        seconds = sum(outcome.seconds for outcome in outcomes) / len(outcomes)
        parameters = f"{outcomes[0].parameters:,}"
        table.add_row(model, parameters, f"{rate:g}", str(epochs), f"{seconds:.1f}")
    return table


def difference(
    found: Found, model: str, baseline: str, metric: str
) -> Comparison | None:
    """Return the paired differences of a metric; None if a run does not have it."""
    values = [
        [run[metric] for run in found[m] if metric in run] for m in (model, baseline)
    ]
    if len(values[0]) != len(found[model]) or len(values[1]) != len(found[baseline]):
        return None
    return compare(*values) if len(values[0]) > 1 else None


def better(metric: str, result: Comparison | None) -> bool:
    """Return whether a model is better in a metric, with p < `LEVEL`."""
    return result is not None and result.t_test < LEVEL and _gain(metric, result) > 0


def verdict(study: Study, source: Source) -> list[str]:
    """Return lines on what pays."""
    found = found_metrics(study, source)
    if isinstance(source.problem, Chain) and source.problem.known_truth:
        return _entire_space_verdict(source, found)
    lines = []
    for baseline in (BOTTOM, SINGLE):
        others = [model for model in found if model != baseline]
        if baseline not in found or not others:
            continue
        lines.append(f"{source.title}, against {baseline}, p < {LEVEL}:")
        for model in others:
            lines.append(f"   {model}: {_words(source, found, model, baseline)}")
    return lines


def _words(source: Source, found: Found, model: str, baseline: str) -> str:
    gains: list[str] = []
    losses: list[str] = []
    for metric, label in source.problem.metrics.items():
        result = difference(found, model, baseline, metric)
        if metric.endswith(_RATIO) or result is None or result.t_test >= LEVEL:
            continue
        (gains if _gain(metric, result) > 0 else losses).append(label)
    parts = []
    if gains:
        parts.append(f"better in {'; '.join(gains)}")
    if losses:
        parts.append(f"worse in {'; '.join(losses)}")
    return " | ".join(parts) or "no difference"


def _entire_space_verdict(source: Source, found: Found) -> list[str]:
    """Compare the entire-space models with the naive one on the same body."""
    lines, winners = [], []
    baselines = [model for model in (BOTTOM, SINGLE) if model in found]
    for model in [model for model in ENTIRE_SPACE if model in found]:
        held = []
        for baseline in baselines:
            results = {
                metric: difference(found, model, baseline, metric)
                for metric in (RATE_AUC, RATE_ECE)
            }
            held.append(all(better(m, r) for m, r in results.items()))
            words = ", ".join(
                f"{source.problem.metrics[m]} {_cell(m, r)}" for m, r in results.items()
            )
            lines.append(f"{model} minus {baseline}: {words}")
        if held and all(held):
            winners.append(model)
    lines.append(
        f"{source.title}: better than {' and '.join(baselines)} in CVR AUC over all "
        f"rows and in calibration, each with p < {LEVEL}: "
        f"{', '.join(winners) or 'none'}"
    )
    return lines


def _cell(metric: str, result: Comparison | None) -> str:
    if result is None:
        return "-"
    mark = ""
    if result.t_test < LEVEL:
        mark = " *" if _gain(metric, result) > 0 else " !"
    return f"{result.mean:+.4f} ({result.t_test:.1g}){mark}"


def _gain(metric: str, result: Comparison) -> float:
    return -result.mean if metric.endswith(_SMALLER) else result.mean
