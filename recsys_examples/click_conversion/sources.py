"""The data of the study behind one interface: in memory, simulated or from files.

A source is a frozen dataclass: a worker process gets it, and reads the rows itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recsys_examples.click_conversion import rand_hie
from recsys_examples.click_conversion.data import Dataset, Part
from recsys_examples.click_conversion.models import Columns, Shape
from recsys_examples.click_conversion.problems import Chain, Goal, Problem, Separate
from recsys_examples.click_conversion.simulator import Impressions, simulate
from recsys_examples.click_conversion.streamed import LOGS, first_rows
from recsys_examples.click_conversion.task_simulator import Tasks, simulate_tasks

HIGH = "high"  # an amount above the median
MAX_BUCKETS = 1 << 16


class Source(Protocol):
    """Rows for one problem."""

    @property
    def name(self) -> str:
        """The name in results, without spaces."""

    @property
    def title(self) -> str:
        """The description in titles."""

    @property
    def problem(self) -> Problem:
        """What is learned."""

    @property
    def bottom(self) -> Shape:
        """The shape of the shared bottom, after which all models are sized."""

    def columns(self) -> Columns:
        """Return the columns of the rows."""

    def parts(self, part: str, seed: int) -> Iterator[Part]:
        """Yield the batches of a part: "train", "validation" or "test"."""

    def identity(self) -> Any:
        """Return what results depend on, as JSON."""


class InMemory:
    """A source whose parts are one batch each."""

    def dataset(self, seed: int) -> Dataset:
        """Return the rows of a run."""
        raise NotImplementedError

    def parts(self, part: str, seed: int) -> Iterator[Part]:
        """Yield the part."""
        yield _kept(self, seed).parts[part]

    def columns(self) -> Columns:
        """Return the columns of the rows."""
        data = _kept(self, 0)
        return Columns(tuple(data.numbers), tuple(data.vocabulary.items()))


@lru_cache(maxsize=2)
def _kept(source: InMemory, seed: int) -> Dataset:
    return source.dataset(seed)


@dataclass(frozen=True)
class SimulatedChain(InMemory):
    """Impressions with a known conversion rate; each seed has its own functions."""

    name: str
    settings: Impressions
    bottom: Shape

    @property
    def title(self) -> str:
        """The description in titles."""
        return f"simulated impressions, {self.name.replace('_', ' ')}"

    @property
    def problem(self) -> Chain:
        """Click, then conversion."""
        return Chain(known_truth=True)

    def columns(self) -> Columns:
        """Return the columns of the rows."""
        return Columns(tuple(f"x{i}" for i in range(self.settings.features)), ())

    def dataset(self, seed: int) -> Dataset:
        """Sample the impressions of a run."""
        return simulate(self.settings, seed)

    def identity(self) -> Any:
        """Return the settings."""
        return asdict(self)


@dataclass(frozen=True)
class SimulatedTasks(InMemory):
    """Two binary tasks of `task_simulator`."""

    name: str
    settings: Tasks
    bottom: Shape

    @property
    def title(self) -> str:
        """The description in titles."""
        return self.name

    @property
    def problem(self) -> Separate:
        """One binary task per label."""
        goals = tuple(Goal(name) for name in self.settings.names)
        return Separate(goals, known_truth=True)

    def columns(self) -> Columns:
        """Return the columns of the rows."""
        numbers = tuple(f"x{i}" for i in range(self.settings.features))
        return Columns(numbers, (("scenario", 1 + self.settings.scenarios),))

    def dataset(self, seed: int) -> Dataset:
        """Sample the rows of a run."""
        return simulate_tasks(self.settings, seed)

    def identity(self) -> Any:
        """Return the settings."""
        return asdict(self)


@dataclass(frozen=True)
class RandHie(InMemory):
    """RAND HIE, split by person; each seed has its own split.

    Attributes:
        name: name in results.
        chain: whether to learn the chain of two events, spending and an amount above
            the median of the training rows with spending; else the tasks spending,
            amount and dollars.
        bottom: the shape of the shared bottom.
        label_share: share of the training people whose labels are known.
        high_share: share of these people whose amount is known.
    """

    name: str
    chain: bool
    bottom: Shape
    label_share: float = 1.0
    high_share: float = 1.0

    @property
    def title(self) -> str:
        """The description in titles."""
        return f"{rand_hie.NAME}, {'chain of events' if self.chain else 'amounts'}"

    @property
    def problem(self) -> Problem:
        """The chain, or the three tasks."""
        if self.chain:
            words = ("spending", "high amount")
            return Chain(rand_hie.SPEND, HIGH, words, by_scenario=True)
        return Separate(
            (
                Goal(rand_hie.SPEND),
                Goal(rand_hie.AMOUNT, "regression", defined=rand_hie.SPEND),
                Goal(rand_hie.DOLLARS, "ziln"),
            )
        )

    def dataset(self, seed: int) -> Dataset:
        """Read and split the rows; scale the labels by the training rows.

        The log amount gets mean 0 and standard deviation 1, dollars mean 1.
        """
        data = rand_hie.load_rand_hie(seed)
        amount = data.train.labels[rand_hie.AMOUNT]
        scales = (
            float(np.nanmedian(amount)),
            float(np.nanmean(amount)),
            float(np.nanstd(amount)),
            float(data.train.labels[rand_hie.DOLLARS].mean()),
        )
        parts = {name: _labelled(part, *scales) for name, part in data.parts.items()}
        parts["train"] = self._with_fewer_labels(parts["train"], seed)
        return Dataset(
            data.name, **parts, vocabulary=data.vocabulary, scenarios=data.scenarios
        )

    def _with_fewer_labels(self, train: Part, seed: int) -> Part:
        people, codes = np.unique(train.groups, return_inverse=True)
        draws = np.random.default_rng([seed, 1]).random((2, len(people)))[:, codes]
        train = _replaced(
            train,
            {HIGH: np.where(draws[1] < self.high_share, train.labels[HIGH], np.nan)},
        )
        return train.take(draws[0] < self.label_share)

    def identity(self) -> Any:
        """Return the settings and a hash of the rows."""
        return {**asdict(self), "rows": _kept(self, 0).fingerprint()}


def _labelled(
    part: Part, median: float, mean: float, deviation: float, dollars: float
) -> Part:
    amount = part.labels[rand_hie.AMOUNT]
    high = np.where(np.isnan(amount), np.nan, amount > median)
    return _replaced(
        part,
        {
            HIGH: high,
            rand_hie.AMOUNT: (amount - mean) / deviation,
            rand_hie.DOLLARS: part.labels[rand_hie.DOLLARS] / dollars,
        },
    )


def _replaced(part: Part, labels: dict[str, np.ndarray]) -> Part:
    new = {name: label.astype(np.float32) for name, label in labels.items()}
    return Part(
        part.features, part.labels | new, part.groups, part.scenario, part.truth
    )


@dataclass(frozen=True)
class RandHiePair(RandHie):
    """RAND HIE as two binary tasks, each on the rows where its label is known."""

    @property
    def problem(self) -> Problem:
        """Spending and, where there is some, a high amount."""
        return Separate((Goal(rand_hie.SPEND), Goal(HIGH)))


@dataclass(frozen=True)
class Files:
    """One of the public logs, read batch by batch.

    Attributes:
        name: one of `streamed.LOGS`.
        folder: the folder with the files.
        bottom: the shape of the shared bottom.
        max_rows: rows of each part to read at most; None for all.
        max_buckets: largest vocabulary size of a category; more values share indices.
    """

    name: str
    folder: Path
    bottom: Shape
    max_rows: int | None = None
    max_buckets: int = MAX_BUCKETS

    @property
    def title(self) -> str:
        """The description in titles."""
        return f"{self.name} in {self.folder}"

    @property
    def problem(self) -> Chain:
        """The chain of the log."""
        return LOGS[self.name].chain

    def columns(self) -> Columns:
        """Return the columns of the rows."""
        return LOGS[self.name].columns(self.max_buckets)

    def parts(self, part: str, seed: int) -> Iterator[Part]:
        """Yield the batches of a part; they do not depend on the seed."""
        batches = LOGS[self.name].read(self.folder, part, self.max_buckets)
        return first_rows(batches, self.max_rows)

    def identity(self) -> Any:
        """Return the settings, and the names and sizes of the files."""
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        return {
            "name": self.name,
            "bottom": self.bottom,
            "max_rows": self.max_rows,
            "max_buckets": self.max_buckets,
            "files": [[p.name, p.stat().st_size] for p in files],
        }
