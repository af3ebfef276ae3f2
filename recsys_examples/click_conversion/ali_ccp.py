r"""Ali-CCP, impressions of Taobao with clicks and conversions, batch by batch.

A folder has `sample_skeleton_train.csv` and `common_features_train.csv`, and the same
for `test`, without headers:

* skeleton: sample id, click, conversion, common feature index, number of features,
  feature list;
* common features: common feature index, number of features, feature list.

A feature list has entries `field \x02 feature \x03 value`, joined by `\x01`. The common
features (of the user) are joined by a database on disk; see `ali_ccp_index`.

References:
    Ma et al. (2018), Entire space multi-task model, SIGIR.
    https://tianchi.aliyun.com/dataset/408
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import streams
from recsys_examples.click_conversion.ali_ccp_index import (
    Encoder,
    Record,
    open_index,
    split_line,
)
from recsys_examples.click_conversion.data import Part
from recsys_examples.errors import InputError

# Vocabulary sizes of the fields with one value: user, item, user and item, position.
# Fields of several values (109_14, 110_14, 127_14, 150_14, 210) are not read.
FIELD_BUCKETS = {
    "101": 1 << 18,  # user
    "121": 128,
    "122": 32,
    "124": 8,
    "125": 16,
    "126": 8,
    "127": 8,
    "128": 8,
    "129": 16,
    "205": 1 << 20,  # item
    "206": 1 << 14,  # category
    "207": 1 << 19,  # shop
    "216": 1 << 18,  # brand
    "508": 1 << 14,
    "509": 1 << 18,
    "702": 1 << 17,
    "853": 1 << 17,
    "301": 8,  # position
}
WEIGHTED_FIELDS = ("508", "509", "702", "853")  # whose values are not all 1
BUCKETS = {f"field_{field}": size for field, size in FIELD_BUCKETS.items()}
NUMBERS = tuple(f"weight_{field}" for field in WEIGHTED_FIELDS)
SCENARIO, USER = "301", "101"


def read_ali_ccp(
    data_dir: str | Path,
    split: str,
    batch_size: int = streams.DEFAULT_BATCH,
    buckets: dict[str, int] | None = None,
    on_unclicked: streams.Unclicked = "raise",
    index_dir: str | Path | None = None,
) -> Iterator[Part]:
    """Read Ali-CCP.

    In memory are one batch of lines and its rows, and 16 MB of the database of common
    features, whatever the size and the order of the files.

    Args:
        data_dir: the folder with the files of the split, or with a subfolder
            `sample_train` or `sample_test` of them, as in the archives.
        split: `"train"` or `"test"`. There is no validation part; users of the training
            files may be held out by their group.
        batch_size: rows per batch.
        buckets: vocabulary sizes that replace those of `BUCKETS`.
        on_unclicked: what to do with a conversion without a click: `"raise"`, or
            `"drop"` the row. The published files have a few, which the literature
            drops.
        index_dir: an existing folder that keeps the database of common features for
            further runs (about 100 bytes per user); it is built again if the file or
            the buckets have changed. None: a temporary one for each iteration.

    Returns:
        An iterator of batches, in the order of the file: int32 categories `field_101`
        and the others of `BUCKETS`, by `streams.bucket` (0 without the field; of a
        repeated field the first entry); the float32 `NUMBERS`, values of the weighted
        fields (0 without the field); the labels `click` and `conversion` (NaN without
        a click); the user as group (-1 without one); and the index of `field_301`
        as scenario.

    Raises:
        ValueError: if an argument is invalid.
        InputError: if a file is missing, or a line is malformed, or its common features
            are missing; the message names the file, the line and the rule.
    """
    streams.check_choice("split", split, ("train", "test"))
    streams.check_choice("on_unclicked", on_unclicked, ("raise", "drop"))
    streams.check_batch_size(batch_size)
    sizes = streams.chosen_buckets(BUCKETS, buckets)
    folder = Path(data_dir)
    if (folder / f"sample_{split}").is_dir():
        folder = folder / f"sample_{split}"
    skeleton, common = (
        streams.find_file(folder / f"{name}_{split}.csv")
        for name in ("sample_skeleton", "common_features")
    )
    if index_dir is not None and not Path(index_dir).is_dir():
        raise InputError(f"{index_dir}: the folder of the index does not exist")
    encoder = Encoder(
        {field: sizes[f"field_{field}"] for field in FIELD_BUCKETS},
        WEIGHTED_FIELDS,
        USER,
    )
    return _read(skeleton, common, batch_size, encoder, on_unclicked, index_dir)


def _read(
    skeleton: Path,
    common: Path,
    batch_size: int,
    encoder: Encoder,
    on_unclicked: streams.Unclicked,
    index_dir: str | Path | None,
) -> Iterator[Part]:
    with ExitStack() as stack:
        if index_dir is None:
            index_dir = stack.enter_context(tempfile.TemporaryDirectory())
        index = stack.enter_context(open_index(common, Path(index_dir), encoder))
        for lines in streams.read_batches(skeleton, batch_size, skip_header=False):
            numbers = [number for number, _ in lines]
            labels, keys, records = _parsed(skeleton, lines, encoder)
            found = index.find(keys)
            for number, key in zip(numbers, keys, strict=True):
                if key not in found:
                    raise InputError(
                        f"{skeleton}, line {number}: the common feature index "
                        f"{streams.shown(key)} must be in {common.name}"
                    )
            commons = [found[key] for key in keys]
            conversion, keep = streams.chain(
                labels[:, 0], labels[:, 1], numbers, skeleton, on_unclicked
            )
            batch = _joined(
                _stacked(records), _stacked(commons), labels[:, 0], conversion, encoder
            )
            yield from streams.kept(batch, keep)


def _parsed(
    path: Path, lines: streams.Lines, encoder: Encoder
) -> tuple[np.ndarray, list[str], list[Record]]:
    """Return the labels (b, 2), the common feature indices, and the features."""
    labels = np.empty((len(lines), 2), np.float32)
    keys, records = [], []
    for row, (number, text) in enumerate(lines):
        fields = split_line(path, number, text, 6)
        for column, name in enumerate(("click", "conversion")):
            label = fields[1 + column]
            if label not in ("0", "1"):
                raise InputError(
                    f"{path}, line {number}: the {name} must be 0 or 1; got "
                    f"{streams.shown(label)}"
                )
            labels[row, column] = label == "1"
        keys.append(fields[3])
        records.append(encoder.encode(path, number, fields[4], fields[5]))
    return labels, keys, records


def _stacked(
    records: list[Record],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, indices, weights = zip(*records, strict=True)
    return np.array(users), np.stack(indices), np.stack(weights)


def _joined(
    sample: tuple[np.ndarray, np.ndarray, np.ndarray],
    common: tuple[np.ndarray, np.ndarray, np.ndarray],
    click: np.ndarray,
    conversion: np.ndarray,
    encoder: Encoder,
) -> Part:
    """Combine the features of samples and users; a field is in one of the two."""
    users = np.where(sample[0] < 0, common[0], sample[0])
    indices = np.where(sample[1] == 0, common[1], sample[1])
    weights = np.where(sample[2] == 0, common[2], sample[2])
    features = {
        f"field_{field}": indices[:, i] for i, field in enumerate(encoder.fields)
    }
    scenario = features[f"field_{SCENARIO}"]
    for i, field in enumerate(encoder.weighted):
        features[f"weight_{field}"] = weights[:, i]
    return Part(features, {"click": click, "conversion": conversion}, users, scenario)
