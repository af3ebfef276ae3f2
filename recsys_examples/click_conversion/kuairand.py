"""KuaiRand-Pure, a log of short videos with randomly exposed ones, batch by batch.

The folder has, with headers, `log_standard_4_08_to_4_21_pure.csv` and
`log_standard_4_22_to_5_08_pure.csv` (exposures of the recommender),
`log_random_4_22_to_5_08_pure.csv` (videos drawn at random: a test without the selection
of the recommender), `user_features_pure.csv` and `video_features_basic_pure.csv`.
`video_features_statistic_pure.csv` is not read: its counts are over the whole period,
with the clicks that are to be predicted.

References:
    Gao et al. (2022), KuaiRand: an unbiased sequential recommendation dataset with
    randomly exposed videos, CIKM. https://kuairand.com
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys_examples.click_conversion import streams
from recsys_examples.click_conversion.data import UNKNOWN, Part
from recsys_examples.errors import InputError

LOGS = {
    "train": "log_standard_4_08_to_4_21_pure.csv",
    "validation": "log_standard_4_22_to_5_08_pure.csv",
    "test": "log_random_4_22_to_5_08_pure.csv",
}
USERS = "user_features_pure.csv"
VIDEOS = "video_features_basic_pure.csv"

# Binary labels and their columns.
SIGNALS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "hate": "is_hate",
}
PLAY_SECONDS = "play_seconds"
SCENARIOS = 15  # values of `tab`, the page of the app

# Vocabulary sizes, at least one more than the documented number of values.
LOG_BUCKETS = {"user_id": 1 << 15, "video_id": 1 << 13, "hour": 25}
USER_BUCKETS = {
    "user_active_degree": 64,
    "is_lowactive_period": 16,
    "is_live_streamer": 16,
    "is_video_author": 16,
    "follow_user_num_range": 64,
    "fans_user_num_range": 64,
    "friend_user_num_range": 64,
    "register_days_range": 64,
    **{f"onehot_feat{i}": 64 for i in range(18)},
    "onehot_feat3": 2048,
    "onehot_feat7": 128,
    "onehot_feat8": 512,
}
VIDEO_BUCKETS = {
    "author_id": 1 << 13,
    "video_type": 16,
    "upload_type": 64,
    "visible_status": 16,
    "music_id": 1 << 13,
    "music_type": 32,
    "tag": 128,
}
BUCKETS = LOG_BUCKETS | USER_BUCKETS | VIDEO_BUCKETS
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
DURATION = "duration"
NUMBERS = (*USER_NUMBERS, DURATION)

_LOG_COLUMNS = (
    *("user_id", "video_id", "hourmin", "tab", "play_time_ms", "duration_ms"),
    *SIGNALS.values(),
)


def read_kuairand(
    data_dir: str | Path,
    split: str,
    batch_size: int = streams.DEFAULT_BATCH,
    buckets: dict[str, int] | None = None,
) -> Iterator[Part]:
    """Read KuaiRand-Pure.

    In memory are one batch of rows, and the features of the 27,285 users and 7,583
    videos as indices and numbers, about 10 MB.

    Args:
        data_dir: the folder with the files, or one with a subfolder `data` of them.
        split: `"train"` and `"validation"` are the earlier and the later log of the
            recommender; `"test"` is the log of randomly exposed videos, of the same
            days as `"validation"`.
        batch_size: rows per batch.
        buckets: vocabulary sizes that replace those of `BUCKETS`.

    Returns:
        An iterator of batches, in the order of the file:

        * int32 categories, the columns of `BUCKETS`, by `streams.bucket`; a video with
          several tags has its first. Users and videos that are not in their files, and
          empty values, have the index 0.
        * float32 numbers: log(1 + x) of the counts `USER_NUMBERS` and of `duration` in
          seconds; missing and negative counts are 0.
        * labels, all known on every row: the 0/1 `SIGNALS`, and `play_seconds`, the
          seconds watched. They are not a strict chain: a video can be liked without a
          click. In the single-column page, `click` means more than 7 seconds, or the
          whole of a shorter video.
        * the user as group, and `tab`, from 0 to 14, as scenario.

    Raises:
        ValueError: if an argument is invalid.
        InputError: if a file is missing or has an invalid value; the message names the
            file, the line and the column.
    """
    streams.check_choice("split", split, list(LOGS))
    streams.check_batch_size(batch_size)
    sizes = streams.chosen_buckets(BUCKETS, buckets)
    folder = _folder(Path(data_dir))
    log, users, videos = (
        streams.find_file(folder / name) for name in (LOGS[split], USERS, VIDEOS)
    )
    return _read(log, users, videos, batch_size, sizes)


def _folder(folder: Path) -> Path:
    return folder / "data" if (folder / "data" / USERS).is_file() else folder


def _read(
    log: Path, users: Path, videos: Path, batch_size: int, sizes: dict[str, int]
) -> Iterator[Part]:
    of_users = _Table.read(users, "user_id", USER_BUCKETS, USER_NUMBERS, sizes)
    of_videos = _Table.read(videos, "video_id", VIDEO_BUCKETS, (), sizes)
    for lines, values in streams.read_numbers(log, _LOG_COLUMNS, batch_size):
        columns = dict(zip(_LOG_COLUMNS, values.T, strict=True))
        yield _batch(log, lines, columns, of_users, of_videos, sizes)


def _batch(
    path: Path,
    lines: list[int],
    columns: dict[str, np.ndarray],
    users: _Table,
    videos: _Table,
    sizes: dict[str, int],
) -> Part:
    user, video, time, tab = (
        _at_least_0(streams.whole(columns[name], lines, path, name), lines, path, name)
        for name in ("user_id", "video_id", "hourmin", "tab")
    )
    for name, values, end in (("hourmin", time, 2400), ("tab", tab, SCENARIOS)):
        if values.max() >= end:
            row = int((values >= end).argmax())
            raise InputError(
                f"{path}, line {lines[row]}, column {name!r}: must be below {end}; got "
                f"{values[row]}"
            )
    play, duration = (
        _at_least_0(columns[name], lines, path, name) / 1000
        for name in ("play_time_ms", "duration_ms")
    )
    features = {
        "user_id": (1 + user % (sizes["user_id"] - 1)).astype(np.int32),
        "video_id": (1 + video % (sizes["video_id"] - 1)).astype(np.int32),
        "hour": (1 + time // 100 % (sizes["hour"] - 1)).astype(np.int32),
        DURATION: np.log1p(duration).astype(np.float32),
    }
    labels = {
        task: streams.binary(columns[name], lines, path, name)
        for task, name in SIGNALS.items()
    }
    return Part(
        features | users.rows(user) | videos.rows(video),
        labels | {PLAY_SECONDS: play.astype(np.float32)},
        user,
        tab.astype(np.int32),
    )


def _at_least_0(
    values: np.ndarray, lines: Sequence[int], path: Path, name: str
) -> np.ndarray:
    if values.min() < 0:
        row = int(values.argmin())
        raise InputError(
            f"{path}, line {lines[row]}, column {name!r}: must be >= 0; got "
            f"{values[row]:g}"
        )
    return values


@dataclass(frozen=True)
class _Table:
    """The features of all users or videos.

    Attributes:
        ids: (k,) sorted ids.
        categories: maps columns to (k + 1,) int32; the last row is for unknown ids.
        numbers: maps columns to (k + 1,) float32.
    """

    ids: np.ndarray
    categories: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]

    def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of the given ids."""
        where = np.searchsorted(self.ids, ids)
        found = self.ids[np.minimum(where, len(self.ids) - 1)] == ids
        where = np.where(found, where, len(self.ids))
        columns = self.categories | self.numbers
        return {name: column[where] for name, column in columns.items()}

    @staticmethod
    def read(
        path: Path,
        key: str,
        categories: dict[str, int],
        numbers: Sequence[str],
        sizes: dict[str, int],
    ) -> _Table:
        """Read a file of features."""
        header = streams.read_header(path, (key, *categories, *numbers))
        ids: list[int] = []
        codes: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        seen: dict[int, int] = {}
        for line, row in _rows(path, header):
            number = _id(row[key], path, line, key)
            first = seen.setdefault(number, line)
            if first != line:
                raise InputError(
                    f"{path}, lines {first} and {line}: a {key} must occur once; got "
                    f"{number} twice"
                )
            ids.append(number)
            codes.append(
                np.array(
                    [streams.bucket(_first(row[c]), sizes[c]) for c in categories],
                    np.int32,
                )
            )
            counts.append(
                np.array([_count(row[c], path, line, c) for c in numbers], np.float32)
            )
        if not ids:
            raise InputError(f"{path}: the file has no rows")
        order = np.argsort(ids)
        code = np.vstack(
            [*(codes[i] for i in order), np.full(len(categories), UNKNOWN)]
        )
        count = np.vstack([*(counts[i] for i in order), np.zeros(len(numbers))])
        return _Table(
            np.array(ids, np.int64)[order],
            dict(zip(categories, code.T.astype(np.int32), strict=True)),
            dict(zip(numbers, np.log1p(count.T.astype(np.float32)), strict=True)),
        )


def _rows(path: Path, header: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield `(line number, values by column)`; values with commas are in quotes."""
    for number, text in streams.read_lines(path):
        if number == 1:
            continue
        fields = next(csv.reader([text]))
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {number}: a row must have {len(header)} values; got "
                f"{len(fields)}"
            )
        yield number, dict(zip(header, fields, strict=True))


def _first(text: str) -> str:
    """Return the first of several values; ranges, such as "(0,10]", are one value."""
    return text if text.startswith(("(", "[")) else text.split(",")[0]


def _id(text: str, path: Path, line: int, name: str) -> int:
    if not text.strip().isdecimal() or len(text) > 18:
        raise InputError(
            f"{path}, line {line}, column {name!r}: must be a whole number >= 0; got "
            f"{streams.shown(text)}"
        )
    return int(text)


def _count(text: str, path: Path, line: int, name: str) -> float:
    try:
        value = float(text) if text.strip() else 0.0
    except ValueError:
        raise InputError(
            f"{path}, line {line}, column {name!r}: must be a number or empty; got "
            f"{streams.shown(text)}"
        ) from None
    return max(value, 0.0) if np.isfinite(value) else 0.0
