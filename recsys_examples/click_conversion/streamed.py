"""The public logs as chains of click and conversion, batch by batch.

A part that the publisher does not have is held out of the training files by a hash of
the group: a tenth of the users or searches for the validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import ali_ccp, aliexpress, kuairand
from recsys_examples.click_conversion.data import Part
from recsys_examples.click_conversion.models import Columns
from recsys_examples.click_conversion.problems import Chain
from recsys_examples.errors import InputError

HELD_OUT = 10  # one of so many groups
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth)


@dataclass(frozen=True)
class Log:
    """A public log.

    Attributes:
        chain: its two events.
        columns: its columns.
        read: function from the folder and the part to the batches.
    """

    chain: Chain
    columns: Columns
    read: Callable[[Path, str], Iterator[Part]]


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


def _divided(
    read: Callable[[Path, str], Iterator[Part]],
) -> Callable[[Path, str], Iterator[Part]]:
    """Return a reader with a validation part out of the training files."""

    def divided(folder: Path, part: str) -> Iterator[Part]:
        if part == "test":
            yield from read(folder, "test")
            return
        for batch in read(folder, "train"):
            keep = held_out(batch.groups) == (part == "validation")
            if keep.any():
                yield batch.take(keep)

    return divided


def _read_ali_ccp(folder: Path, part: str) -> Iterator[Part]:
    for batch in ali_ccp.read_ali_ccp(folder, part, on_unclicked="drop"):
        # Weights are counts of a user's actions, from below 1 to thousands.
        squeezed = {
            name: np.log1p(np.maximum(batch.features[name], 0))
            for name in ali_ccp.NUMBERS
        }
        yield _with(batch, features=batch.features | squeezed, labels=batch.labels)


def _read_aliexpress(folder: Path, part: str) -> Iterator[Part]:
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
    for batch in aliexpress.read_aliexpress(
        folder, part, countries, on_unclicked="drop"
    ):
        country = batch.scenario + np.int32(1)
        yield _with(
            batch, features={**batch.features, "country": country}, labels=batch.labels
        )


def _read_kuairand(folder: Path, part: str) -> Iterator[Part]:
    for batch in kuairand.read_kuairand(folder, part):
        click, like = batch.labels["click"], batch.labels["like"]
        labels = {
            "click": click,
            "conversion": np.where(click == 1, like, np.float32(np.nan)),
        }
        page = batch.scenario + np.int32(1)
        yield _with(batch, features={**batch.features, "tab": page}, labels=labels)


def _with(
    batch: Part, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Part:
    return Part(features, labels, batch.groups, batch.scenario)


LOGS = {
    "ali_ccp": Log(
        Chain(),
        Columns(ali_ccp.NUMBERS, tuple(ali_ccp.BUCKETS.items())),
        _divided(_read_ali_ccp),
    ),
    # The second event is a like after a click.
    "kuairand": Log(
        Chain(words=("click", "like")),
        Columns(
            kuairand.NUMBERS,
            (*kuairand.BUCKETS.items(), ("tab", 1 + kuairand.SCENARIOS)),
        ),
        _read_kuairand,
    ),
    "aliexpress": Log(
        Chain(),
        Columns(
            aliexpress.NUMBERS,
            (*aliexpress.BUCKETS.items(), ("country", 1 + len(aliexpress.COUNTRIES))),
        ),
        _divided(_read_aliexpress),
    ),
}
