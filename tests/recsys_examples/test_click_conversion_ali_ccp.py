"""Ali-CCP: values by hand from files of the published format, the join, every error."""

import tempfile
import threading
import tracemalloc

import numpy as np
import pytest

from recsys_examples.click_conversion.ali_ccp import BUCKETS, NUMBERS, read_ali_ccp
from recsys_examples.errors import InputError


def features(*entries):
    """The number of features, and their list."""
    parts = [f"{field}\x02{feature}\x03{value}" for field, feature, value in entries]
    return f"{len(parts)},{chr(1).join(parts)}"


def sample(i, click, conversion, key, *entries):
    return f"{i},{click},{conversion},{key},{features(*entries)}"


def common(key, *entries):
    return f"{key},{features(*entries)}"


USER_A = common(
    "bacff91692951881",
    ("101", "31319", "1.0"),
    ("121", "20", "1.0"),
    ("109_14", "555", "2.3"),
    ("109_14", "556", "0.7"),
)
USER_B = common("a0", ("101", "7", "1.0"), ("124", "2", "1.0"))
SAMPLES = [
    sample(1, 0, 0, "bacff91692951881", ("205", "40", "1.0"), ("301", "2", "1.0")),
    sample(2, 1, 0, "a0", ("508", "9", "2.5"), ("508", "10", "1.5"), ("301", "1", "1")),
    sample(3, 1, 1, "bacff91692951881", ("853", "11", "0.5"), ("210", "3", "1.0")),
]


def write(folder, samples=SAMPLES, commons=(USER_A, USER_B), split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("sample_skeleton", samples), ("common_features", commons)):
        (folder / f"{name}_{split}.csv").write_text("\n".join(lines) + "\n")


def fault(folder, **arguments):
    with pytest.raises(InputError) as caught:
        list(read_ali_ccp(folder, "train", **arguments))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


class TestValues:
    @pytest.mark.parametrize("place", ["", "sample_train"])
    def test_by_hand(self, tmp_path, place):
        write(tmp_path / place)
        (batch,) = read_ali_ccp(tmp_path, "train")
        assert list(batch.features) == [*BUCKETS, *NUMBERS]
        # 1 + the feature; 0 without the field.
        expected = {
            "field_101": [31320, 8, 31320],
            "field_121": [21, 0, 21],
            "field_124": [0, 3, 0],
            "field_205": [41, 0, 0],
            "field_508": [0, 10, 0],  # the first entry
            "field_853": [0, 0, 12],
            "field_301": [3, 2, 0],
            "weight_508": [0, 2.5, 0],
            "weight_853": [0, 0, 0.5],
        }
        for name, column in batch.features.items():
            assert column.tolist() == expected.get(name, [0, 0, 0]), name
            assert column.dtype == (np.int32 if name in BUCKETS else np.float32)
        assert batch.labels["click"].tolist() == [0, 1, 1]
        np.testing.assert_array_equal(batch.labels["conversion"], [np.nan, 0, 1])
        assert batch.groups.tolist() == [31319, 7, 31319]
        assert batch.scenario.tolist() == [3, 2, 0]

    def test_buckets(self, tmp_path):
        write(tmp_path)
        (batch,) = read_ali_ccp(tmp_path, "train", buckets={"field_101": 11})
        # 1 + 31319 % 10, 1 + 7 % 10
        assert batch.features["field_101"].tolist() == [10, 8, 10]
        assert batch.groups.tolist() == [31319, 7, 31319]

    def test_no_features(self, tmp_path):
        write(tmp_path, [sample(1, 0, 0, "k")], [common("k")])
        (batch,) = read_ali_ccp(tmp_path, "train")
        assert batch.groups.tolist() == [-1]
        assert all(column.tolist() == [0] for column in batch.features.values())

    def test_unclicked_conversions(self, tmp_path):
        write(tmp_path, [*SAMPLES, sample(4, 0, 1, "a0"), sample(5, 0, 0, "a0")])
        assert fault(tmp_path).startswith(
            "sample_skeleton_train.csv, line 4: a conversion must have a click"
        )
        batches = read_ali_ccp(tmp_path, "train", on_unclicked="drop", batch_size=2)
        assert [len(batch) for batch in batches] == [2, 1, 1]


class TestJoin:
    def test_users_in_any_order_and_more_than_a_query_has(self, tmp_path):
        rng = np.random.default_rng(0)
        users = rng.permutation(1500)
        order = rng.integers(1500, size=4000)
        write(
            tmp_path,
            [sample(i, 0, 0, f"key{u}") for i, u in enumerate(order)],
            [common(f"key{u}", ("101", str(u), "1.0")) for u in users],
        )
        batches = list(read_ali_ccp(tmp_path, "train", batch_size=3000))
        assert [len(batch) for batch in batches] == [3000, 1000]
        found = np.concatenate([batch.groups for batch in batches])
        np.testing.assert_array_equal(found, order)

    def test_an_index_is_kept_until_the_file_changes(self, tmp_path):
        write(tmp_path)
        kept = tmp_path / "index"
        kept.mkdir()
        list(read_ali_ccp(tmp_path, "train", index_dir=kept))
        (path,) = kept.iterdir()
        assert path.name == "common_features_train.sqlite"
        before = path.stat().st_mtime_ns, path.stat().st_ino
        list(read_ali_ccp(tmp_path, "train", index_dir=kept))
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
        other = list(
            read_ali_ccp(tmp_path, "train", index_dir=kept, buckets={"field_101": 3})
        )
        assert other[0].features["field_101"].tolist() == [2, 2, 2]
        write(tmp_path, SAMPLES[1:2], [common("a0", ("101", "12345", "1.0"))])
        (batch,) = read_ali_ccp(tmp_path, "train", index_dir=kept)
        assert batch.groups.tolist() == [12345]
        assert len(list(kept.iterdir())) == 1

    def test_a_failed_build_leaves_no_index(self, tmp_path):
        write(tmp_path, commons=[USER_A, "malformed"])
        kept = tmp_path / "index"
        kept.mkdir()
        fault(tmp_path, index_dir=kept)
        assert not list(kept.iterdir())

    def test_a_file_that_is_no_database_is_not_replaced(self, tmp_path):
        write(tmp_path)
        path = tmp_path / "common_features_train.sqlite"
        path.write_text("notes " * 1000)
        assert "not a readable database" in fault(tmp_path, index_dir=tmp_path)
        assert path.read_text().startswith("notes")

    def test_no_folder_for_the_index(self, tmp_path):
        write(tmp_path)
        message = fault(tmp_path, index_dir=tmp_path / "nowhere")
        assert message == "nowhere: the folder of the index does not exist"

    def test_a_temporary_index_is_removed(self, tmp_path, monkeypatch):
        write(tmp_path / "data")
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        reader = read_ali_ccp(tmp_path / "data", "train", batch_size=1)
        next(reader)
        assert len(list(tmp_path.glob("temporary/*/*.sqlite"))) == 1
        reader.close()
        assert not list((tmp_path / "temporary").iterdir())

    def test_threads_take_turns(self, tmp_path):
        write(tmp_path)
        reader = read_ali_ccp(tmp_path, "train", batch_size=1)
        found = [len(next(reader))]
        thread = threading.Thread(target=lambda: found.extend(map(len, reader)))
        thread.start()
        thread.join()
        assert found == [1, 1, 1]


# Changed lines of the skeleton, and the error after the file and the line.
BAD_SAMPLES = [
    ("4,0,0,a0,0", "a line must have 6 values; got 5"),
    ("4,0,0,a0,0,,", "a line must have 6 values; got 7"),
    ("4,2,0,a0,0,", "the click must be 0 or 1; got '2'"),
    ("4,1,,a0,0,", "the conversion must be 0 or 1; got ''"),
    (
        "4,0,0,b1,0,",
        "the common feature index 'b1' must be in common_features_train.csv",
    ),
    (
        "4,0,0,a0,2,205\x021\x031",
        "the number of features must be that of the list, 1; got '2'",
    ),
    ("4,0,0,a0,x,", "the number of features must be that of the list, 0; got 'x'"),
]
ENTRY = "a feature must be field, \\x02, feature, \\x03, number; got "
BAD_ENTRIES = ["205", "205\x021", "205\x02\x031", "\x021\x031", "205\x031\x021", ""]


class TestFaults:
    @pytest.mark.parametrize(("line", "message"), BAD_SAMPLES)
    @pytest.mark.parametrize("batch_size", [1, 100])
    def test_skeleton(self, tmp_path, line, message, batch_size):
        write(tmp_path, [*SAMPLES, line])
        found = fault(tmp_path, batch_size=batch_size)
        assert found == f"sample_skeleton_train.csv, line 4: {message}"

    @pytest.mark.parametrize("entry", BAD_ENTRIES)
    def test_feature_lists(self, tmp_path, entry):
        text = f"2,207\x021\x031.0\x01{entry}"
        write(tmp_path, [*SAMPLES, f"4,0,0,a0,{text}"])
        expected = f"line 4: {ENTRY}{entry!r}"
        assert fault(tmp_path) == f"sample_skeleton_train.csv, {expected}"
        write(tmp_path, commons=[USER_A, USER_B, f"c,{text}"])
        expected = f"line 3: {ENTRY}{entry!r}"
        assert fault(tmp_path) == f"common_features_train.csv, {expected}"

    @pytest.mark.parametrize("value", ["x", "nan", "inf"])
    def test_weights(self, tmp_path, value):
        write(tmp_path, [sample(1, 0, 0, "a0", ("508", "1", value))])
        assert f"line 1: {ENTRY}'508\\x021\\x03{value}'" in fault(tmp_path)

    def test_an_index_twice(self, tmp_path):
        write(tmp_path, commons=[USER_A, USER_B, USER_A])
        assert fault(tmp_path) == (
            "common_features_train.csv, line 3: a common feature index must occur "
            "once; got 'bacff91692951881' again"
        )

    @pytest.mark.parametrize("name", ["sample_skeleton", "common_features"])
    def test_a_file_is_missing_or_empty(self, tmp_path, name):
        write(tmp_path)
        path = tmp_path / f"{name}_train.csv"
        path.write_text("\n")
        assert fault(tmp_path) == f"{name}_train.csv: the file has no rows"
        path.unlink()
        with pytest.raises(InputError, match=f"{name}_train.csv: missing"):
            read_ali_ccp(tmp_path, "train")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "validation"}, r"split must be one of \['train', 'test'\]"),
            ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
            ({"on_unclicked": "keep"}, "on_unclicked must be one of .* got 'keep'"),
            ({"buckets": {"101": 9}}, "a column of buckets must be one of .* '101'"),
        ],
    )
    def test_arguments(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            read_ali_ccp(tmp_path, **{"split": "train", **arguments})


def test_memory_does_not_depend_on_the_size_of_the_files(tmp_path):
    history = [("109_14", str(k), "1.0") for k in range(100)]
    write(
        tmp_path,
        [sample(i, 0, 0, f"k{i % 3000}", ("205", str(i), "1")) for i in range(30_000)],
        [common(f"k{u}", ("101", str(u), "1.0"), *history) for u in range(3000)],
    )
    bound = 1_500_000
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 3 * bound
    list(read_ali_ccp(tmp_path, "train", batch_size=200))
    tracemalloc.start()
    try:
        rows = 0
        for batch in read_ali_ccp(tmp_path, "train", batch_size=200):
            rows += len(batch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 30_000
    assert peak < bound
