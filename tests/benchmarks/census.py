"""Accuracy beside speed: MMoE on the Census-Income rows, with each library."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group
from tests.benchmarks.census_rows import prepare
from tests.benchmarks.environments import FOLDER

TITLE = "Accuracy beside speed"
ABOUT = """\
MMoE on the rows of Census-Income (tasks: income above 50,000 $, never married), as
[the example](results.md) reads and splits them: the official training rows, and test
rows. All libraries have the same inputs (an embedding of 8 values for each column of
categories, and numbers), 8 experts of 64 and 32 units, towers of 16, Adam with a rate
of 0.001 and batches of 1024 rows for the same number of epochs. Nothing was tuned for
any of them; initialization, penalties and batch normalization are those of each
library. The time is that of training, without compilation; each round has its own seed.
"""
BARS: list[Bar] = []

OURS, DEEPCTR, RECHUB = "keras_moe", "DeepCTR", "torch-rechub, as published"


def groups(profile: str) -> list[Group]:
    """Return one group, whose rounds are seeds."""
    path = FOLDER / f"census-{profile}.npz"
    missing = prepare(path, rows=20_000 if profile == "fast" else None)
    epochs = 1 if profile == "fast" else 3
    arguments = {"path": str(path), "epochs": epochs}
    cases = tuple(
        Case(
            series,
            environment,
            f"tests.benchmarks.{module}",
            arguments,
            ours=series == OURS,
            missing=missing,
        )
        for series, environment, module in (
            (DEEPCTR, "deepctr", "peers.deepctr_census"),
            (OURS, "own", "ours.census"),
            (RECHUB, "torch", "peers.torch_rechub_census"),
        )
    )
    seeds = {"fast": 1, "regular": 5, "large": 10}[profile]
    point = {"model": "MMoE", "e": 8, "epochs": epochs}
    return [Group("census", point, cases, DEEPCTR, rounds=seeds)]
