"""A short version of the long profile of files, and damage that it may not draw."""

import contextlib
import random
import re
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_moe import export
from recsys_examples.movielens.__main__ import main
from tests.robustness import files, read_cases
from tests.robustness.damage import KINDS, copied, damage, room, without_root

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow exports"
)
# The other groups take longer: formats, mounts, processes.
SHORT = {
    "`keras_moe.export.load`": 10,
    "data folders": 27,
    "results of": 15,
    "backups of": 8,
}


@pytest.mark.parametrize("start", SHORT)
def test_the_long_profile(start):
    (group,) = [group for group in files.GROUPS if group.what.startswith(start)]
    (tried,) = files.run(SHORT[start], seed=1, groups=(replace(group, share=1.0),))
    assert tried.survived == tried.cases == SHORT[start], tried.note


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    return read_cases.write_saved_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def scratch():
    """A folder that every user may enter, unlike pytest's `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def folder(saved_models, scratch):
    with copied(saved_models["mixture"], scratch) as copy:
        yield copy


DAMAGED = {
    "saved_model.pb": "saved_model.pb is damaged, or was changed",
    "variables/variables.index": "variables.index is damaged, or was changed",
    "variables/variables.data-00000-of-00001": "cannot be loaded: a file is damaged",
    "assets.extra/sha256sums.txt": "is damaged",
    "fingerprint.pb": "fingerprint.pb is damaged, or was changed",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_flipped_bit_in_each_file_is_named(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=DAMAGED[name]) as error:
        read_cases.read_saved_model("mixture", folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_variables_file(folder):
    """It was an IndexError."""
    (folder / "variables/variables.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be loaded.*export the model again"):
        read_cases.read_saved_model("mixture", folder)


def test_a_changed_vocabulary(saved_models, tmp_path):
    """TensorFlow would load it, and find other rows."""
    with copied(saved_models["vocabulary"], tmp_path) as folder:
        path = folder / "assets/cities.txt"
        path.write_text("Oslo\nRome\nBonn\n")
        message = re.escape(f"{path} is damaged, or was changed")
        with pytest.raises(ValueError, match=message):
            read_cases.read_saved_model("vocabulary", folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "does not exist"),
        ("a-file", "must be the folder of a SavedModel; it is a file"),
        ("", "is not a SavedModel: it has no file saved_model.pb"),
    ],
)
def test_no_saved_model(tmp_path, name, message):
    (tmp_path / "a-file").write_text("")
    with pytest.raises(ValueError, match=message) as error:
        read_cases.read_saved_model("mixture", tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_without_checksums_it_is_loaded(folder):
    expected = read_cases.read_saved_model("mixture", folder)
    (folder / "assets.extra/sha256sums.txt").unlink()
    (folder / "assets.extra").rmdir()
    np.testing.assert_array_equal(
        read_cases.read_saved_model("mixture", folder), expected
    )
    # A flipped bit in a name is a KeyError or DecodeError of TensorFlow.
    path = folder / "saved_model.pb"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_cases.read_saved_model("mixture", folder)


class TestWriteChecksums:
    """It was TensorFlow's error, and a file cut short."""

    def test_a_file_that_may_not_be_read(self, folder):
        (folder / "fingerprint.pb").chmod(0)
        with without_root(), pytest.raises(OSError, match="Permission denied") as error:
            export.write_checksums(folder)
        assert f"the checksums of {folder} cannot be written" in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_full_disk(self, folder):
        (folder / export._loading.CHECKSUMS).write_text("before")
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with room(10), pytest.raises(OSError, match="File too large") as error:
                export.write_checksums(folder)
        finally:
            signal.signal(signal.SIGXFSZ, handler)
        assert str(folder / export._loading.CHECKSUMS) in str(error.value)
        (name,) = (folder / "assets.extra").iterdir()
        assert name.read_text() == "before"


def test_an_operation_of_a_later_version(folder):
    from tensorflow.core.protobuf import saved_model_pb2

    path = folder / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for function in model.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            node.op = node.op.replace("MatMul", "LaterMatMul")
    path.write_bytes(model.SerializeToString())
    export.write_checksums(folder)
    with pytest.raises(ValueError, match=r"cannot be loaded.*LaterMatMul") as error:
        read_cases.read_saved_model("mixture", folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("kind", [*dict.fromkeys(KINDS)])
def test_recommend_with_a_damaged_run(scratch, kind, capfd):
    """The command prints one line and returns 2."""
    run = scratch / "run"
    read_cases.write_recommender(run)
    path = run / "saved_model" / "saved_model.pb"
    arguments = ["recommend", "--user", "3", "--model", str(run)]
    if kind == "unreadable":
        assert main(arguments) == 0  # imports what only root may read
        capfd.readouterr()
    damage(path, kind, random.Random(3))
    if kind == "unreadable":
        with without_root():
            status = main(arguments)
    else:
        status = main(arguments)
    assert status == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert str(run) in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_standard_output(tmp_path, capfd):
    read_cases.write_recommender(tmp_path / "run")
    arguments = ["recommend", "--user", "3", "--model", str(tmp_path / "run")]
    with Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        status = main(arguments)
    assert status == 2
    expected = "error: the standard output: No space left on device\n"
    assert capfd.readouterr().err == expected
