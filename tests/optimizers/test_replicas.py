"""Two replicas with half a batch each train as one device with all of it."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.support import processes

ROOT = Path(__file__).parent.parent.parent
CASES = [
    "FusedAdam",
    "FusedAdam, clipped",
    "FusedAdam, averaged",
    "FusedAdagrad",
    "LazyAdam",
    "RowwiseAdagrad",
    pytest.param(
        "MultiOptimizer",
        marks=pytest.mark.skipif(
            not hasattr(keras.optimizers, "MultiOptimizer"), reason="since Keras 3.15"
        ),
    ),
    "scaled",
]

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)


@pytest.fixture(scope="module")
def found():
    done = processes.run(["-m", "tests.support.mirrored_optimizers"], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_train_as_one_device(found, case):
    one, two = found[case]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["FusedAdam", "FusedAdagrad"])
@pytest.mark.parametrize(
    "name", ["ema_overwrite_frequency", "gradient_accumulation_steps"]
)
def test_what_keras_cannot_do_on_replicas_is_refused_by_name(found, kind, name):
    message = found[f"{kind}, {name}"]
    assert message.startswith(f"{kind} under a tf.distribute strategy")
    assert f"`{name}` must not be set" in message
    assert message.endswith(f"{name}=2, 2 replicas")
