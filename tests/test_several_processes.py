"""Two JAX processes train as one does, and one loads what they saved."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.support import processes

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="started from TensorFlow's run"
    ),
]


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("jax")
    done = processes.run(
        ["-m", "tests.support.several_processes", "2"],
        cwd=ROOT,
        timeout=1100,
        KERAS_BACKEND="jax",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one(found):
    *several, one = found
    assert [process["devices"] for process in found] == [2, 2, 1]
    for process in several:
        assert process["history"].keys() == one["history"].keys()
        for name, values in one["history"].items():
            np.testing.assert_allclose(
                process["history"][name], values, rtol=1e-4, err_msg=name
            )
        close(process["weights"], one["weights"])


def test_what_each_process_saved_is_loaded_by_one(found):
    *several, one = found
    for number, process in enumerate(several):
        close(one["loaded"][f"{number}-of-2.keras"], process["weights"])
    own, loaded = one["continued"]
    for name, values in own.items():
        np.testing.assert_allclose(loaded[name], values, rtol=1e-4, err_msg=name)


def test_experts_split_over_processes_are_saved_in_one_file(found):
    """Keras' own `save` needs all of a variable in each process."""
    *several, one = (process["split"] for process in found)
    for process in several:
        # Each process has two of four experts, before and after loading.
        assert process["split"] == process["loaded"] == [False, [2, 12, 8]]
        assert process["file"] == [True, []]  # And nothing unfinished.
        assert process["refused"]  # By both, if the first cannot write.
        np.testing.assert_allclose(
            process["predictions"], one["predictions"], rtol=1e-5, atol=1e-6
        )
        # Slots of the optimizer are in the file too.
        for history in process["continued"]:
            np.testing.assert_allclose(
                history["loss"], one["continued"]["loss"], rtol=1e-4
            )
