"""Optimizers of models with large tables, by the number of rows."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "Optimizers of tables"
ABOUT = """\
One table of width 16 for all columns of ids, a hidden layer of 64 units, batches of
1024 rows, TensorFlow without XLA. A step is the function that `fit` compiles and calls.
64 batches of uniform random ids take turns, so that their rows are not all in the
caches. With 20 columns a batch of a larger table also has more distinct ids; with 1
column nearly as many.
"""
KERAS_ADAM = "keras Adam"
SERIES = (
    KERAS_ADAM,
    "keras Adagrad",
    "keras SGD",
    "tf_keras Adam",
    "tf_keras Adagrad",
    "FusedAdam",
    "FusedAdagrad",
    "LazyAdam",
    "RowwiseAdagrad",
)
LAZY = ("LazyAdam", "RowwiseAdagrad")
_SIZES = (10**4, 10**5, 10**6, 10**7)

BARS = [
    Bar(
        f"Step at 10 million rows over that at 10,000, {name}, {columns} column(s)",
        1.3,
        {"columns": columns, "optimizer": name},
        f"{10**7:,} rows",
        f"{10**4:,} rows",
        at_most=True,
    )
    for name in LAZY
    for columns in (1, 20)
]


def groups(profile: str) -> list[Group]:
    """Return groups of one size with all optimizers, and of one with all sizes."""
    if profile == "fast":
        return [_all_optimizers(10**5, (KERAS_ADAM, "tf_keras Adam", "LazyAdam"))]
    sizes = _SIZES[:-1] if profile == "regular" else _SIZES
    found = [_all_optimizers(rows, SERIES) for rows in sizes]
    return found + [_all_sizes(name, columns) for name in LAZY for columns in (1, 20)]


def _all_optimizers(rows: int, series: tuple[str, ...]) -> Group:
    point = {"columns": 20, "rows": rows}
    cases = tuple(_case(name, name, rows, 20) for name in series)
    # Keras' Adam makes several arrays of the size of the table in a step.
    return Group("optimizers", point, cases, baseline=KERAS_ADAM, max_gib=8.0)


def _all_sizes(name: str, columns: int) -> Group:
    cases = tuple(_case(f"{rows:,} rows", name, rows, columns) for rows in _SIZES)
    point = {"columns": columns, "optimizer": name}
    return Group("optimizers", point, cases, baseline=cases[0].series)


def _case(series: str, optimizer: str, rows: int, columns: int) -> Case:
    arguments = {"optimizer": optimizer, "rows": rows, "columns": columns}
    if optimizer.startswith("tf_keras"):
        module = "tests.benchmarks.peers.tf_keras"
        return Case(series, "keras_hub", module, arguments)
    ours = not optimizer.startswith("keras")
    module = "tests.benchmarks.ours.tables"
    return Case(series, "own", module, arguments, ours=ours)
