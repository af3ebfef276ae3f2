"""AliExpress search logs of four countries, batch by batch.

A folder `AliExpress_NL`, `AliExpress_ES`, `AliExpress_FR` or `AliExpress_US` has
`train.csv` and `test.csv` with a header: `search_id`, `categorical_1` to `_16`,
`numerical_1` to `_63`, `click`, `conversion`. The countries are scenarios.

References:
    Li et al. (2020), Improving multi-scenario learning to rank in e-commerce by
    exploiting task relationships in the label space, CIKM.
    https://tianchi.aliyun.com/dataset/74690
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import streams
from recsys_examples.click_conversion.data import Part
from recsys_examples.errors import InputError

COUNTRIES = ("NL", "ES", "FR", "US")
CATEGORIES = tuple(f"categorical_{i}" for i in range(1, 17))
NUMBERS = tuple(f"numerical_{i}" for i in range(1, 64))
GROUP = "search_id"
LABELS = ("click", "conversion")
BUCKETS = {name: 1024 for name in CATEGORIES}


def read_aliexpress(
    data_dir: str | Path,
    split: str,
    countries: Sequence[str] = COUNTRIES,
    batch_size: int = streams.DEFAULT_BATCH,
    buckets: dict[str, int] | None = None,
    on_unclicked: streams.Unclicked = "raise",
) -> Iterator[Part]:
    """Read AliExpress, with one batch of rows per country in memory.

    The countries take turns, a batch each, until all files are read. A batch has rows
    of one country, in the order of the file.

    Args:
        data_dir: the folder with the folders of the countries, or, with one country,
            its folder.
        split: `"train"` or `"test"`. There is no validation part; the files are
            divided in time, and a validation part should come from the training file.
        countries: those to read, of `COUNTRIES`. A row's scenario is the position of
            its country in `COUNTRIES`, whichever are read.
        batch_size: rows per batch.
        buckets: vocabulary sizes that replace those of `BUCKETS`. A code c >= 0 has the
            index `1 + c % (size - 1)`, a negative code the index 0 (unknown).
        on_unclicked: what to do with a conversion without a click: `"raise"`, or
            `"drop"` the row.

    Returns:
        An iterator of batches: the int32 `CATEGORIES`, the float32 `NUMBERS` as in the
        file (most are in [0, 1]), the labels `click` and `conversion` (NaN without a
        click), and the search as group.

    Raises:
        ValueError: if an argument is invalid.
        InputError: if a file is missing or has an invalid value; the message names the
            file, the line and the column.
    """
    streams.check_choice("split", split, ("train", "test"))
    streams.check_choice("on_unclicked", on_unclicked, ("raise", "drop"))
    streams.check_batch_size(batch_size)
    for country in countries:
        streams.check_choice("countries", country, COUNTRIES)
    if not countries or len(set(countries)) < len(countries):
        raise ValueError(f"countries must be different, at least one; got {countries}")
    sizes = streams.chosen_buckets(BUCKETS, buckets)
    readers = [
        _read(path, COUNTRIES.index(country), batch_size, sizes, on_unclicked)
        for country, path in _files(Path(data_dir), split, countries).items()
    ]
    return _in_turn(readers)


def _files(folder: Path, split: str, countries: Sequence[str]) -> dict[str, Path]:
    name = f"{split}.csv"
    found = {}
    for country in countries:
        places = [folder / f"AliExpress_{country}", folder / country]
        if len(countries) == 1:
            places.append(folder)
        paths = [place / name for place in places if (place / name).is_file()]
        if not paths:
            raise InputError(
                f"{folder}: no {name} of AliExpress {country}; looked in "
                f"{', '.join(str(place) for place in places)}"
            )
        found[country] = paths[0]
    return found


def _in_turn(readers: list[Iterator[Part]]) -> Iterator[Part]:
    while readers:
        for reader in list(readers):
            batch = next(reader, None)
            if batch is None:
                readers.remove(reader)
            else:
                yield batch


def _read(
    path: Path,
    scenario: int,
    batch_size: int,
    sizes: dict[str, int],
    on_unclicked: streams.Unclicked,
) -> Iterator[Part]:
    columns = (GROUP, *CATEGORIES, *NUMBERS, *LABELS)
    where = {name: i for i, name in enumerate(columns)}
    for lines, values in streams.read_numbers(path, columns, batch_size):
        features = {}
        for name in CATEGORIES:
            codes = streams.whole(values[:, where[name]], lines, path, name)
            indices = np.where(codes < 0, 0, 1 + codes % (sizes[name] - 1))
            features[name] = indices.astype(np.int32)
        for name in NUMBERS:
            features[name] = values[:, where[name]].astype(np.float32)
        click, conversion = (
            streams.binary(values[:, where[name]], lines, path, name) for name in LABELS
        )
        conversion, keep = streams.chain(click, conversion, lines, path, on_unclicked)
        batch = Part(
            features,
            {"click": click, "conversion": conversion},
            streams.whole(values[:, where[GROUP]], lines, path, GROUP),
            np.full(len(lines), scenario, np.int32),
        )
        yield from streams.kept(batch, keep)
