"""The map: cells, gains with intervals by hand, rules and the picture."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from recsys_examples.click_conversion import regimes
from recsys_examples.click_conversion.models import equal_shape
from recsys_examples.click_conversion.pictures import draw
from recsys_examples.click_conversion.regimes import (
    FACTORS,
    LINES,
    RAND_HIE,
    Cell,
    Gain,
    cells,
    gains,
)
from recsys_examples.click_conversion.results import Outcome
from recsys_examples.click_conversion.settings import BOTTOM, MIXTURES, MMOE, PLE

ROWS = 1000


class TestCells:
    def test_a_name_is_of_one_source(self):
        by_name = {}
        for cell in cells(ROWS):
            assert by_name.setdefault(cell.source.name, cell.source) == cell.source
        assert not any(" " in name for name in by_name)
        assert [source.name for source in regimes.sources(cells(ROWS))] == list(by_name)
        # The base settings of two lines in four factors, and of RAND HIE in three.
        assert len(by_name) == len(cells(ROWS)) - (2 * 3 + 2)

    def test_every_factor_has_its_levels(self):
        for factor in FACTORS:
            here = [cell for cell in cells(ROWS) if cell.factor == factor]
            for line in {cell.line for cell in here}:
                levels = [cell.level for cell in here if cell.line == line]
                assert tuple(levels) == regimes.LEVELS[factor]

    def test_only_the_factor_differs(self):
        for line, correlation in LINES.items():
            for cell in cells(ROWS):
                if cell.line != line:
                    continue
                settings = cell.source.settings
                assert settings.correlation == correlation
                changed = {
                    regimes.SCARCITY: settings.label_share,
                    regimes.IMBALANCE: settings.imbalance,
                    regimes.SCENARIOS: settings.scenario_difference,
                    regimes.SIZE: cell.source.bottom.width,
                    regimes.ROWS: settings.rows / ROWS,
                }
                assert changed.pop(cell.factor) == cell.level
                base = {
                    regimes.SCARCITY: 1.0,
                    regimes.IMBALANCE: 1.0,
                    regimes.SCENARIOS: 0.0,
                    regimes.SIZE: regimes.BASE_BOTTOM.width,
                    regimes.ROWS: 1.0,
                }
                assert all(value == base[name] for name, value in changed.items())

    def test_all_models_of_a_cell_have_about_equal_parameters(self):
        shapes = {
            (c.source.problem, c.source.columns(), c.source.bottom) for c in cells(ROWS)
        }
        assert len(shapes) == 7  # sizes, with 1 or 4 scenarios, and RAND HIE
        for problem, columns, bottom in shapes:
            sizes = [
                equal_shape(problem, model, columns, bottom)[1]
                for model in (BOTTOM, *MIXTURES)
            ]
            assert max(sizes) < 1.1 * sizes[0], (columns, bottom, sizes)
            assert min(sizes) > 0.9 * sizes[0], (columns, bottom, sizes)

    def test_rand_hie(self):
        here = [cell for cell in cells(ROWS) if cell.line == RAND_HIE]
        assert {cell.factor for cell in here} == {
            regimes.SCARCITY,
            regimes.IMBALANCE,
            regimes.SIZE,
        }
        assert {cell.source.label_share for cell in here} == {0.1, 0.3, 1.0}


AUCS = {
    BOTTOM: [0.70, 0.72, 0.74, 0.76],
    MMOE: [0.71, 0.74, 0.77, 0.80],  # 0.01 to 0.04 above
    PLE: [0.70, 0.72, 0.74, 0.76],
}


class FakeStudy:
    """Four runs of each model."""

    def outcomes(self, source, model):
        names = [n for n in source.problem.metrics if n.endswith("_auc")]
        # Both tasks together have the mean above.
        return [
            Outcome({names[0]: value - 0.1, names[1]: value + 0.1}, 10, 0.1)
            for value in AUCS[model]
        ]


def test_gains():
    found = gains(FakeStudy(), cells(ROWS))
    assert len(found) == len(cells(ROWS)) * len(MIXTURES)
    gain = next(g for g in found if g.model == MMOE)
    assert gain.mean == pytest.approx(0.025)
    assert gain.bottom == pytest.approx(0.73)
    # The standard deviation of 1, 2, 3, 4 is 1.2910; t of 3 degrees is 3.1824.
    half = 3.1824 * 0.012910 / 2
    assert gain.high - gain.mean == pytest.approx(half, rel=1e-3)
    assert gain.mean - gain.low == pytest.approx(half, rel=1e-3)
    same = next(g for g in found if g.model == PLE)
    assert same.mean == same.low == same.high == 0.0


def made(model, low, high, factor=regimes.SCARCITY, line="tasks agree", level=1.0):
    cell = Cell(factor, line, level, None)
    return Gain(cell, model, (low + high) / 2, low, high, 0.7)


def test_rules():
    found = [
        made(MMOE, 0.01, 0.03),
        made(MMOE, 0.001, 0.002, level=0.3),
        made(MMOE, -0.01, 0.03, level=0.1),
        made(MMOE, -0.03, -0.01, line="tasks conflict"),
        made(PLE, -0.01, 0.01),
    ]
    lines = regimes.rules(found)
    assert lines[0] == (
        "MMoE: above the shared bottom in 2 of 4 cells, below in 1; by 0.005 or more "
        "in 1, and below by as much in 1"
    )
    assert lines[1].startswith("   largest gains: share of rows with labels = 1, tasks")
    assert lines[-1].startswith("PLE: above the shared bottom in 0 of 1 cells")


def test_tables_and_picture(tmp_path):
    found = gains(FakeStudy(), cells(ROWS))
    console = Console(file=io.StringIO(), width=200)
    for table in regimes.tables(found):
        console.print(table)
    printed = console.file.getvalue()
    assert "+0.0250 [+0.0045, +0.0455]" in printed
    assert all(factor in printed for factor in FACTORS)
    draw(tmp_path / "map.png", found)
    picture = plt.imread(tmp_path / "map.png", format="png")
    grey = picture[..., :3].mean(axis=-1)
    assert len(np.unique(grey.round(2))) > 20
