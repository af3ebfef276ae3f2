"""Two workers of `MultiWorkerMirroredStrategy` train a LegacyLayer as one process."""

import importlib.util
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
        keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("tf_keras") is None, reason="tf_keras is missing"
    ),
]


@pytest.fixture(scope="module")
def found():
    done = processes.run(
        ["-m", "tests.support.legacy_workers", "2"], cwd=ROOT, timeout=1100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_two_workers_train_as_one(found):
    *several, one = found
    assert [worker["replicas"] for worker in found] == [2, 2, 1]
    assert np.ptp(one["bias"]) > 0.05
    for worker in several:
        np.testing.assert_allclose(worker["bias"], one["bias"], atol=1e-6)
        for name, values in one["history"].items():
            np.testing.assert_allclose(
                worker["history"][name], values, rtol=1e-4, err_msg=name
            )
        for a, b in zip(worker["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_of_keras_3_is_refused_with_the_way_that_works(found):
    message = found[0]["refused"]
    assert "MultiTaskModel cannot be trained under" in message
    assert "MultiWorkerMirroredStrategy" in message
    assert "keras_moe.tfrs.LegacyLayer" in message
    assert "2 replicas" in message
