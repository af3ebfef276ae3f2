"""The public logs as chains of click and conversion, batch by batch.

A part that the publisher does not have is held out of the training files by a hash of
the group: a tenth of the users or searches for the validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import ali_ccp, aliexpress, kuairand
from recsys_examples.click_conversion.data import Part
from recsys_examples.click_conversion.models import Columns
from recsys_examples.click_conversion.problems import Chain
from recsys_examples.errors import InputError

HELD_OUT = 10  # one of so many groups
Reader = Callable[[Path, str, dict[str, int]], Iterator[Part]]
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth)


@dataclass(frozen=True)
class Log:
    """A public log.

    Attributes:
        chain: its two events.
        numbers: names of its numbers.
        buckets: vocabulary sizes of its categories by default.
        of_scenario: the column made of the scenario, and its vocabulary size; None.
        reader: function from the folder, the part and the vocabulary sizes to batches.
    """

    chain: Chain
    numbers: tuple[str, ...]
    buckets: dict[str, int]
    of_scenario: tuple[str, int] | None
    reader: Reader

    def columns(self, max_buckets: int) -> Columns:
        """Return the columns of the batches."""
        scenario = () if self.of_scenario is None else (self.of_scenario,)
        return Columns(self.numbers, (*self._limited(max_buckets).items(), *scenario))

    def read(self, folder: Path, part: str, max_buckets: int) -> Iterator[Part]:
        """Yield the batches of a part: "train", "validation" or "test"."""
        for batch in self.reader(folder, part, self._limited(max_buckets)):
            if self.of_scenario is None:
                yield batch
                continue
            name, _ = self.of_scenario
            scenario = batch.scenario + np.int32(1)
            yield replace(batch, features={**batch.features, name: scenario})

    def _limited(self, max_buckets: int) -> dict[str, int]:
        return {name: min(size, max_buckets) for name, size in self.buckets.items()}


def held_out(groups: np.ndarray) -> np.ndarray:
    """Return the (n,) mask of rows whose group is for the validation."""
    mixed = groups.astype(np.uint64) * _MULTIPLIER
    return (mixed >> np.uint64(40)) % np.uint64(HELD_OUT) == 0


def first_rows(batches: Iterable[Part], max_rows: int | None) -> Iterator[Part]:
    """Yield batches up to a number of rows; None for all."""
    left = max_rows
    for batch in batches:
        if left is not None and len(batch) >= left:
            yield batch.take(np.arange(left))
            return
        yield batch
        left = None if left is None else left - len(batch)


def _divided(read: Reader) -> Reader:
    """Return a reader with a validation part out of the training files."""

    def divided(folder: Path, part: str, buckets: dict[str, int]) -> Iterator[Part]:
        if part == "test":
            yield from read(folder, "test", buckets)
            return
        for batch in read(folder, "train", buckets):
            keep = held_out(batch.groups) == (part == "validation")
            if keep.any():
                yield batch.take(keep)

    return divided


def _read_ali_ccp(folder: Path, part: str, buckets: dict[str, int]) -> Iterator[Part]:
    for batch in ali_ccp.read_ali_ccp(
        folder, part, buckets=buckets, on_unclicked="drop"
    ):
        # Weights are counts of a user's actions, from below 1 to thousands.
        squeezed = {
            name: np.log1p(np.maximum(batch.features[name], 0))
            for name in ali_ccp.NUMBERS
        }
        yield replace(batch, features=batch.features | squeezed)


def _read_aliexpress(
    folder: Path, part: str, buckets: dict[str, int]
) -> Iterator[Part]:
    countries = [
        name
        for name in aliexpress.COUNTRIES
        if any((folder / n).is_dir() for n in (f"AliExpress_{name}", name))
    ]
    if not countries:
        raise InputError(
            f"{folder}: must have a folder AliExpress_NL, AliExpress_ES, "
            "AliExpress_FR or AliExpress_US; found none"
        )
    yield from aliexpress.read_aliexpress(
        folder, part, countries, buckets=buckets, on_unclicked="drop"
    )


def _read_kuairand(folder: Path, part: str, buckets: dict[str, int]) -> Iterator[Part]:
    for batch in kuairand.read_kuairand(folder, part, buckets=buckets):
        click, like = batch.labels["click"], batch.labels["like"]
        conversion = np.where(click == 1, like, np.float32(np.nan))
        yield replace(batch, labels={"click": click, "conversion": conversion})


LOGS = {
    "ali_ccp": Log(
        Chain(), ali_ccp.NUMBERS, ali_ccp.BUCKETS, None, _divided(_read_ali_ccp)
    ),
    # The second event is a like after a click.
    "kuairand": Log(
        Chain(words=("click", "like")),
        kuairand.NUMBERS,
        kuairand.BUCKETS,
        ("tab", 1 + kuairand.SCENARIOS),
        _read_kuairand,
    ),
    "aliexpress": Log(
        Chain(),
        aliexpress.NUMBERS,
        aliexpress.BUCKETS,
        ("country", 1 + len(aliexpress.COUNTRIES)),
        _divided(_read_aliexpress),
    ),
}
