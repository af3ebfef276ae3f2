"""The record that all data sources return, and the split of rows by person.

Axis letters: n rows.

A source is in memory (`rand_hie`, `simulator`, `task_simulator`: a `Dataset`), or read
batch by batch from files (`ali_ccp`, `kuairand`, `aliexpress`: an iterator of `Part`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

UNKNOWN = 0  # index of missing and unknown categories
SHARES = (0.6, 0.2, 0.2)  # of the groups: training, validation, test


@dataclass(frozen=True)
class Part:
    """n rows: a split of a data set, or a batch of it.

    Attributes:
        features: maps each column to its (n,) values. int32 columns are categories:
            indices below the vocabulary size, 0 for missing or unknown. float32 columns
            are numbers; the source documents their units and scales.
        labels: maps each task to its (n,) float32 label. NaN means unknown: such rows
            are not in the task's loss. The label of a second stage, such as
            `conversion`, is NaN where the first stage did not occur; see `joint_label`.
        groups: (n,) int64, the person, user or search of a row.
        scenario: (n,) int32, the market, place or page of a row; 0 if there is one.
        truth: for simulated rows, maps names to (n,) float64 values that no real log
            has, such as the probability behind a label. Empty for real data.

    Raises:
        ValueError: if the columns differ in their number of rows.
    """

    features: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    groups: np.ndarray
    scenario: np.ndarray
    truth: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self._columns().items():
            if column.shape != (len(self),):
                raise ValueError(
                    f"{name} must have shape ({len(self)},), as groups; got "
                    f"{column.shape}"
                )

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: np.ndarray) -> Part:
        """Return the given rows (indices or a mask), in the given order."""

        def taken(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: column[rows] for name, column in columns.items()}

        return Part(
            taken(self.features),
            taken(self.labels),
            self.groups[rows],
            self.scenario[rows],
            taken(self.truth),
        )

    def _columns(self) -> dict[str, np.ndarray]:
        named = {"scenario": self.scenario, "groups": self.groups}
        for kind in ("features", "labels", "truth"):
            for name, column in getattr(self, kind).items():
                named[f"{kind}[{name!r}]"] = column
        return named


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test rows.

    Attributes:
        name: description of the source, for titles.
        train: the training rows.
        validation: the rows for the choice of settings.
        test: the rows for the results.
        vocabulary: maps each categorical column to the number of its indices,
            including 0 for missing and unknown values.
        scenarios: number of scenarios.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    vocabulary: dict[str, int]
    scenarios: int = 1

    @property
    def parts(self) -> dict[str, Part]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def numbers(self) -> list[str]:
        """The columns of numbers."""
        return [name for name in self.train.features if name not in self.vocabulary]

    def fingerprint(self) -> str:
        """Return a hash of all columns."""
        digest = hashlib.sha256()
        for part in self.parts.values():
            for name, column in part._columns().items():
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]


def joint_label(
    labels: Mapping[str, np.ndarray], first: str, second: str
) -> np.ndarray:
    """Return the label of both stages, which is known on every row.

    It is 0 where the first stage did not occur, whether or not the second label is NaN,
    as entire-space models need it (click and conversion, pCTCVR).

    Args:
        labels: labels of n rows.
        first: the first stage, whose label is 0 or 1.
        second: the second stage.

    Returns:
        (n,) float32.

    Example:

    >>> labels = {"click": np.float32([0, 1]), "conversion": np.float32([np.nan, 1])}
    >>> joint_label(labels, "click", "conversion")
    array([0., 1.], dtype=float32)
    """
    return np.where(labels[first] == 0, np.float32(0), labels[second])


def split_groups(
    groups: np.ndarray, seed: int, shares: tuple[float, float, float] = SHARES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split rows into training, validation and test, by group.

    Args:
        groups: (n,) group of each row.
        seed: seed of the split.
        shares: share of the groups (not of the rows) in each part; the sum is 1.

    Returns:
        The sorted row numbers of the three parts. No group is in two of them.

    Raises:
        ValueError: if a part would have no group.
    """
    names, codes = np.unique(groups, return_inverse=True)
    ends = np.round(np.cumsum(shares)[:2] * len(names)).astype(int)
    sizes = np.diff([0, *ends, len(names)])
    if sizes.min() < 1:
        raise ValueError(
            f"each part must have a group; got {len(names)} groups for shares of "
            f"{shares}"
        )
    part_of_group = np.repeat([0, 1, 2], sizes)
    np.random.default_rng(seed).shuffle(part_of_group)
    part = part_of_group[codes]
    train, validation, test = (np.flatnonzero(part == k) for k in range(3))
    return train, validation, test


def split_part(
    rows: Part,
    seed: int,
    name: str,
    vocabulary: dict[str, int] | None = None,
    scenarios: int = 1,
) -> Dataset:
    """Split rows by group into a data set; see `split_groups`."""
    train, validation, test = split_groups(rows.groups, seed)
    return Dataset(
        name,
        rows.take(train),
        rows.take(validation),
        rows.take(test),
        vocabulary or {},
        scenarios,
    )
