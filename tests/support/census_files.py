"""A Census-Income so small that models train on it in seconds, in both formats."""

import gzip

import numpy as np

from recsys_examples.census_income.columns import (
    CATEGORIES,
    INCOMES,
    LABEL,
    NUMBERS,
    OFFICIAL,
    OPTIONAL,
)

CUT = [name for name in OFFICIAL if name not in OPTIONAL]


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Valid rows whose labels can be learned: the old and rich earn, the young are
    single, who works much went to college.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = {
            name: str(rng.choice(sorted(known))) for name, known in CATEGORIES.items()
        }
        row |= {name: str(rng.integers(0, 90)) for name in NUMBERS}
        row["weight"] = f"{rng.uniform(40, 18000):.2f}"
        gains = int(rng.choice([0, 0, 0, 5178, 15024]))
        row["capital gains"] = str(gains)
        row["dividends from stocks"] = str(rng.choice([0, 0, 0, 5, 250, 99999]))
        age, weeks = int(row["age"]), int(row["weeks worked in year"])
        row[LABEL] = INCOMES[int(rng.random() < 0.1 + 0.6 * (gains > 0))]
        single = rng.random() < (0.9 if age < 30 else 0.1)
        row["marital stat"] = "Never married" if single else "Divorced"
        college = rng.random() < (0.8 if weeks > 45 else 0.1)
        row["education"] = "Bachelors degree(BA AB BS)" if college else "Children"
        rows.append(row)
    return rows


def official_text(rows) -> str:
    """42 columns without a header, as published: some values with a blank after."""
    padded = {"Handlers equip cleaners etc", "Foreign born- Not a citizen of U S"}
    lines = []
    for row in rows:
        values = [row[name] + " " * (row[name] in padded) for name in OFFICIAL]
        lines.append(", ".join(values) + "\n")
    return "".join(lines)


def cut_text(rows, columns=CUT) -> str:
    """A header, and the columns that are left."""
    lines = [",".join(columns)] + [",".join(row[n] for n in columns) for row in rows]
    return "\n".join(lines) + "\n"


def write_official(folder, train, test, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("census-income.data", train), ("census-income.test", test)):
        write(folder / name, official_text(rows), zipped)
    return folder


def write_cut(folder, train, test, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.csv", train), ("test.csv", test)):
        write(folder / name, cut_text(rows), zipped)
    return folder


def write(path, text, zipped=False):
    if zipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
