"""Where do mixtures pay? The cells of the map, and a rule of thumb.

Each cell has an own data set: one factor differs from the base setting, at tasks that
agree and at tasks that conflict. A shared bottom, MMoE and PLE of about equal numbers
of parameters are tuned with the same budget in each cell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from rich.table import Table
from scipy import stats

from recsys_examples.click_conversion.models import Shape
from recsys_examples.click_conversion.settings import (
    BOTTOM,
    MAP_FACTORS,
    MIXTURES,
    Budget,
)
from recsys_examples.click_conversion.sources import (
    RandHiePair,
    SimulatedTasks,
    Source,
)
from recsys_examples.click_conversion.study import Study
from recsys_examples.click_conversion.task_simulator import Tasks

LEVEL = 0.95  # of the intervals
SMALL = 0.005  # a mean gain in AUC below it is called small

BASE_BOTTOM = Shape(64)
RAND_HIE = "RAND HIE"
# Correlations of the tasks in the lines of the picture.
AGREE, CONFLICT = 0.9, -0.9
LINES = {"tasks agree": AGREE, "tasks conflict": CONFLICT}


@dataclass(frozen=True)
class Plan:
    """The size of the map."""

    budget: Budget
    rows: int


PLANS = {
    "tiny": Plan(Budget((0.01,), (1,), 1, 3), 600),
    "default": Plan(Budget((0.003, 0.01), (5, 15)), 20_000),
    "full": Plan(Budget((0.001, 0.003, 0.01, 0.03), (5, 15, 45), 3, 20), 100_000),
}


@dataclass(frozen=True)
class Cell:
    """A data set of the map.

    Attributes:
        factor: what differs from the base setting.
        line: the setting of the tasks, one of `LINES`, or `RAND_HIE`.
        level: the value of the factor.
        source: the data.
    """

    factor: str
    line: str
    level: float
    source: Source


@dataclass(frozen=True)
class Gain:
    """Mixture minus shared bottom in one cell.

    Attributes:
        cell: the cell.
        model: one of `settings.MIXTURES`.
        mean: mean difference of the AUC, a mean over the tasks.
        low: lower end of the 95% interval, by Student's t over the seeds.
        high: upper end.
        bottom: mean AUC of the shared bottom.
    """

    cell: Cell
    model: str
    mean: float
    low: float
    high: float
    bottom: float


CONFLICT_FACTOR = "correlation of the tasks"
SCARCITY, IMBALANCE = "share of rows with labels", "labels of task 2 / task 1"
SCENARIOS, SIZE = "difference of the scenarios", "units of the shared bottom"
ROWS = "rows / rows of the base"
FACTORS = (CONFLICT_FACTOR, SCARCITY, IMBALANCE, SCENARIOS, SIZE, ROWS)
BY_NAME = dict(zip(MAP_FACTORS, FACTORS, strict=True))
LEVELS: dict[str, tuple[float, ...]] = {
    CONFLICT_FACTOR: (-1.0, -0.5, 0.0, 0.5, 1.0),
    SCARCITY: (0.1, 0.3, 1.0),
    IMBALANCE: (0.01, 0.1, 1.0),
    SCENARIOS: (0.0, 0.5, 1.0),
    SIZE: (16, 64, 256),
    ROWS: (1.0, 2.5, 5.0),
}


def cells(rows: int, factors: Collection[str] = FACTORS) -> list[Cell]:
    """Return the cells of the map.

    Args:
        rows: rows of the simulator in the base setting.
        factors: those of `FACTORS` to vary.
    """
    return [cell for cell in _all_cells(rows) if cell.factor in factors]


def _all_cells(rows: int) -> list[Cell]:
    base = Tasks(rows=rows, features=32)
    found = [
        _simulated(CONFLICT_FACTOR, "", p, replace(base, correlation=p))
        for p in LEVELS[CONFLICT_FACTOR]
    ]
    for line, p in LINES.items():
        with_p = replace(base, correlation=p)
        for share in LEVELS[SCARCITY]:
            changed = replace(with_p, label_share=share)
            found.append(_simulated(SCARCITY, line, share, changed))
        for ratio in LEVELS[IMBALANCE]:
            changed = replace(with_p, imbalance=ratio)
            found.append(_simulated(IMBALANCE, line, ratio, changed))
        for difference in LEVELS[SCENARIOS]:
            changed = replace(with_p, scenarios=4, scenario_difference=difference)
            found.append(_simulated(SCENARIOS, line, difference, changed))
        for units in LEVELS[SIZE]:
            found.append(_simulated(SIZE, line, units, with_p, Shape(int(units))))
        for factor in LEVELS[ROWS]:
            changed = replace(with_p, rows=int(factor * rows))
            found.append(_simulated(ROWS, line, factor, changed))
    return found + list(_rand_hie_cells())


def _simulated(
    factor: str, line: str, level: float, tasks: Tasks, bottom: Shape = BASE_BOTTOM
) -> Cell:
    # By the settings: the base setting is a cell of several factors, and runs once.
    name = (
        f"correlation_{tasks.correlation:g}_labels_{tasks.label_share:g}_ratio_"
        f"{tasks.imbalance:g}_scenarios_{tasks.scenarios}_difference_"
        f"{tasks.scenario_difference:g}_units_{bottom.width}_rows_{tasks.rows}"
    )
    return Cell(factor, line, level, SimulatedTasks(name, tasks, bottom))


def _rand_hie_cells() -> Iterator[Cell]:
    def source(
        share: float = 1.0, ratio: float = 1.0, bottom: Shape = BASE_BOTTOM
    ) -> RandHiePair:
        name = f"rand_hie_labels_{share:g}_ratio_{ratio:g}_units_{bottom.width}"
        return RandHiePair(name, True, bottom, share, ratio)

    for share in LEVELS[SCARCITY]:
        yield Cell(SCARCITY, RAND_HIE, share, source(share=share))
    for ratio in LEVELS[IMBALANCE]:
        yield Cell(IMBALANCE, RAND_HIE, ratio, source(ratio=ratio))
    for units in LEVELS[SIZE]:
        yield Cell(SIZE, RAND_HIE, units, source(bottom=Shape(int(units))))


def sources(cells: Iterable[Cell]) -> list[Source]:
    """Return the data of all cells, each once."""
    return list({cell.source.name: cell.source for cell in cells}.values())


def gains(study: Study, cells: Iterable[Cell]) -> list[Gain]:
    """Return the gain of each mixture in each cell."""
    return [_gain(study, cell, model) for cell in cells for model in MIXTURES]


def _gain(study: Study, cell: Cell, model: str) -> Gain:
    ours, bottom = (_aucs(study, cell.source, name) for name in (model, BOTTOM))
    differences = ours - bottom
    count = len(differences)
    error = differences.std(ddof=1) / count**0.5
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    mean = float(differences.mean())
    return Gain(cell, model, mean, mean - half, mean + half, float(bottom.mean()))


def _aucs(study: Study, source: Source, model: str) -> np.ndarray:
    """Return the mean AUC of the tasks, (r,) over the runs."""
    runs = [outcome.values for outcome in study.outcomes(source, model)]
    names = [name for name in source.problem.metrics if name.endswith("_auc")]
    return np.array([np.mean([run[name] for name in names]) for run in runs])


def tables(found: list[Gain]) -> list[Table]:
    """Return a table of the gains for each factor."""
    made = []
    for factor in dict.fromkeys(gain.cell.factor for gain in found):
        table = Table(
            title=f"{factor}: mixture minus shared bottom, mean AUC of the tasks "
            f"[{LEVEL:.0%} interval]",
            title_justify="left",
        )
        for heading in (factor, "tasks", "SharedBottom", *MIXTURES):
            table.add_column(heading, justify="right")
        here = [gain for gain in found if gain.cell.factor == factor]
        for cell in dict.fromkeys(gain.cell for gain in here):
            by_model = {gain.model: gain for gain in here if gain.cell == cell}
            table.add_row(
                f"{cell.level:g}",
                cell.line,
                f"{next(iter(by_model.values())).bottom:.4f}",
                *(words(by_model[model]) for model in MIXTURES),
            )
        made.append(table)
    return made


def words(gain: Gain) -> str:
    """Return the gain with its interval, for tables."""
    return f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def rules(found: list[Gain]) -> list[str]:
    """Return the rule of thumb, from the intervals."""
    lines = []
    for model in MIXTURES:
        here = [gain for gain in found if gain.model == model]
        above = [gain for gain in here if gain.low > 0]
        below = [gain for gain in here if gain.high < 0]
        lines.append(
            f"{model}: above the shared bottom in {len(above)} of {len(here)} cells, "
            f"below in {len(below)}; by {SMALL} or more in "
            f"{sum(g.mean >= SMALL for g in above)}, and below by as much in "
            f"{sum(g.mean <= -SMALL for g in below)}"
        )
        for kind, chosen in (("gains", above), ("losses", below)):
            largest = sorted(chosen, key=lambda gain: -abs(gain.mean))[:5]
            lines += [
                f"   largest {kind}: {g.cell.factor} = {g.cell.level:g}"
                f"{', ' + g.cell.line if g.cell.line else ''}: {words(g)}"
                for g in largest
            ]
    return lines
