"""KuaiRand-Pure: values by hand from files of the published format, every error."""

import math
import tracemalloc

import numpy as np
import pytest

from recsys_examples.click_conversion import kuairand, streams
from recsys_examples.click_conversion.kuairand import BUCKETS, NUMBERS, read_kuairand
from recsys_examples.errors import InputError

LOG_HEADER = [
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like"),
    *("is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
    *("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"),
    *("is_profile_enter", "is_rand", "tab"),
]
USER_HEADER = [
    *("user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer"),
    *("is_video_author", "follow_user_num", "follow_user_num_range", "fans_user_num"),
    *("fans_user_num_range", "friend_user_num", "friend_user_num_range"),
    *("register_days", "register_days_range"),
    *(f"onehot_feat{i}" for i in range(18)),
]
VIDEO_HEADER = [
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type"),
    *("visible_status", "video_duration", "server_width", "server_height"),
    *("music_id", "music_type", "tag"),
]


def exposure(user=0, video=3, **values):
    found = dict.fromkeys(LOG_HEADER, "0")
    return found | {"user_id": str(user), "video_id": str(video)} | values


def user(number, **values):
    found = dict.fromkeys(USER_HEADER, "0")
    return found | {
        "user_id": str(number),
        "user_active_degree": "full_active",
        "follow_user_num_range": '"(0,10]"',
        **values,
    }


def video(number, **values):
    found = dict.fromkeys(VIDEO_HEADER, "")
    return found | {
        "video_id": str(number),
        "author_id": "17",
        "video_type": "NORMAL",
        "visible_status": "1.0",
        "music_id": "9155697141",
        "music_type": "9.0",
        "tag": "39",
        **values,
    }


def write(path, rows, header):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(row[name] for name in header) for row in rows]
    path.write_text("\n".join([",".join(header), *lines]) + "\n")


def write_all(folder, log, users=None, videos=None, split="train"):
    for name in kuairand.LOGS.values():
        write(folder / name, [exposure()], LOG_HEADER)
    write(folder / kuairand.LOGS[split], log, LOG_HEADER)
    write(folder / kuairand.USERS, users or [user(0), user(7)], USER_HEADER)
    write(folder / kuairand.VIDEOS, videos or [video(3), video(1)], VIDEO_HEADER)


def fault(*arguments, **keywords):
    with pytest.raises(InputError) as caught:
        list(read_kuairand(*arguments, **keywords))
    message = str(caught.value)
    assert "\n" not in message
    return message


LOG = [
    exposure(7, 1, hourmin="900", tab="1", is_click="1", duration_ms="11000"),
    exposure(0, 3, hourmin="2300", tab="14", long_view="1", play_time_ms="5332"),
    exposure(5, 8, is_like="1"),  # unknown user and video
]


class TestValues:
    @pytest.fixture
    def batch(self, tmp_path):
        users = [
            user(7, register_days="99", fans_user_num="", onehot_feat3="1153.0"),
            user(0, register_days="-124", onehot_feat3="", is_video_author="1"),
        ]
        videos = [
            video(3, tag='"12,39"', author_id=""),
            video(1, upload_type="ShortImport"),
        ]
        write_all(tmp_path, LOG, users, videos)
        (batch,) = read_kuairand(tmp_path, "train")
        return batch

    def test_columns(self, batch):
        assert set(batch.features) == {*BUCKETS, *NUMBERS}
        for name, column in batch.features.items():
            assert column.dtype == (np.int32 if name in BUCKETS else np.float32), name
            if name in BUCKETS:
                assert column.max() < BUCKETS[name], name
        assert set(kuairand.USER_BUCKETS) | set(kuairand.USER_NUMBERS) == set(
            USER_HEADER[1:]
        )

    def test_of_the_log(self, batch):
        assert batch.features["user_id"].tolist() == [8, 1, 6]
        assert batch.features["video_id"].tolist() == [2, 4, 9]
        assert batch.features["hour"].tolist() == [10, 24, 1]
        # log(1 + 11 s)
        np.testing.assert_allclose(
            batch.features["duration"], [math.log(12), 0, 0], rtol=1e-6
        )
        assert batch.groups.tolist() == [7, 0, 5]
        assert batch.scenario.tolist() == [1, 14, 0]

    def test_labels(self, batch):
        expected = {task: [0, 0, 0] for task in kuairand.SIGNALS}
        expected |= {"click": [1, 0, 0], "long_view": [0, 1, 0], "like": [0, 0, 1]}
        for task, label in expected.items():
            assert batch.labels[task].tolist() == label, task
            assert batch.labels[task].dtype == np.float32
        np.testing.assert_allclose(batch.labels["play_seconds"], [0, 5.332, 0])

    def test_of_users(self, batch):
        # 1 + 1153; empty; unknown user
        assert batch.features["onehot_feat3"].tolist() == [1154, 0, 0]
        assert batch.features["is_video_author"].tolist() == [1, 2, 0]
        degree = streams.bucket("full_active", 64)
        assert batch.features["user_active_degree"].tolist() == [degree, degree, 0]
        range_ = streams.bucket("(0,10]", 64)
        assert batch.features["follow_user_num_range"].tolist() == [range_, range_, 0]
        # log(1 + 99); a negative count and an unknown user: 0
        np.testing.assert_allclose(
            batch.features["register_days"], [math.log(100), 0, 0], rtol=1e-6
        )
        assert batch.features["fans_user_num"].tolist() == [0, 0, 0]

    def test_of_videos(self, batch):
        assert batch.features["author_id"].tolist() == [18, 0, 0]
        assert batch.features["tag"].tolist() == [40, 13, 0]  # the first tag
        assert batch.features["visible_status"].tolist() == [2, 2, 0]
        assert batch.features["music_type"].tolist() == [10, 10, 0]
        assert batch.features["music_id"].tolist() == [
            1 + 9155697141 % (BUCKETS["music_id"] - 1)
        ] * 2 + [0]
        upload = streams.bucket("ShortImport", 64)
        assert batch.features["upload_type"].tolist() == [upload, 0, 0]


class TestFiles:
    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_splits_and_subfolder(self, tmp_path, split):
        write_all(tmp_path / "data", LOG * 2, split=split)
        batches = list(read_kuairand(tmp_path, split, batch_size=4))
        assert [len(batch) for batch in batches] == [4, 2]

    def test_buckets(self, tmp_path):
        write_all(tmp_path, LOG)
        (batch,) = read_kuairand(tmp_path, "train", buckets={"user_id": 5, "tag": 3})
        # 1 + (7, 0, 5) % 4, and 1 + 39 % 2
        assert batch.features["user_id"].tolist() == [4, 1, 2]
        assert batch.features["tag"].tolist() == [2, 2, 0]

    @pytest.mark.parametrize(
        "name", [kuairand.LOGS["train"], kuairand.USERS, kuairand.VIDEOS]
    )
    def test_a_file_is_missing(self, tmp_path, name):
        write_all(tmp_path, LOG)
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=f"{name}: missing"):
            read_kuairand(tmp_path, "train")


class TestFaults:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"is_click": "2"}, "column 'is_click': must be 0 or 1; got 2"),
            ({"long_view": ""}, "column 'long_view': must be a finite number; got ''"),
            ({"tab": "15"}, "column 'tab': must be below 15; got 15"),
            ({"tab": "0.5"}, "column 'tab': must be a whole number; got 0.5"),
            ({"user_id": "-1"}, "column 'user_id': must be >= 0; got -1"),
            ({"hourmin": "2400"}, "column 'hourmin': must be below 2400; got 2400"),
            ({"play_time_ms": "-5"}, "column 'play_time_ms': must be >= 0; got -5"),
        ],
    )
    def test_values_of_the_log(self, tmp_path, values, message):
        write_all(tmp_path, [*LOG, exposure(**values)])
        path = tmp_path / kuairand.LOGS["train"]
        assert fault(tmp_path, "train") == f"{path}, line 5, {message}"

    @pytest.mark.parametrize(
        ("name", "header", "lost"),
        [
            (kuairand.LOGS["train"], LOG_HEADER, "is_like"),
            (kuairand.USERS, USER_HEADER, "onehot_feat17"),
            (kuairand.VIDEOS, VIDEO_HEADER, "tag"),
        ],
    )
    def test_a_column_is_missing(self, tmp_path, name, header, lost):
        write_all(tmp_path, LOG)
        row = exposure() | user(0) | video(0)
        write(tmp_path / name, [row], [n for n in header if n != lost])
        expected = f"{tmp_path / name}, line 1, column {lost!r}: missing"
        assert fault(tmp_path, "train") == expected

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"user_id": "x"},
                ", column 'user_id': must be a whole number >= 0; got 'x'",
            ),
            (
                {"register_days": "x"},
                ", column 'register_days': must be a number or empty; got 'x'",
            ),
            ({"onehot_feat0": "1,2"}, ": a row must have 31 values; got 32"),
        ],
    )
    def test_values_of_users(self, tmp_path, values, message):
        write_all(tmp_path, LOG, [user(0), user(1, **values)])
        path = tmp_path / kuairand.USERS
        assert fault(tmp_path, "train") == f"{path}, line 3{message}"

    def test_a_video_twice(self, tmp_path):
        write_all(tmp_path, LOG, videos=[video(3), video(1), video(3)])
        assert fault(tmp_path, "train").endswith(
            "lines 2 and 4: a video_id must occur once; got 3 twice"
        )

    def test_no_users(self, tmp_path):
        write_all(tmp_path, LOG)
        write(tmp_path / kuairand.USERS, [], USER_HEADER)
        assert fault(tmp_path, "train").endswith(
            f"{kuairand.USERS}: the file has no rows"
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "random"}, "split must be one of .* got 'random'"),
            ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
            ({"buckets": {"tab": 3}}, "a column of buckets must be one of .* 'tab'"),
        ],
    )
    def test_arguments(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            read_kuairand(tmp_path, **{"split": "train", **arguments})


def test_memory_does_not_depend_on_the_size_of_the_log(tmp_path):
    write_all(tmp_path, LOG * 30_000)
    bound = 1_000_000
    assert (tmp_path / kuairand.LOGS["train"]).stat().st_size > 3 * bound
    reader = read_kuairand(tmp_path, "train", batch_size=500)
    next(reader)
    tracemalloc.start()
    try:
        rows = sum(len(batch) for batch in reader)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 90_000 - 500
    assert peak < bound
