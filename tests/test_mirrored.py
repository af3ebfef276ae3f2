"""Two replicas that see the same rows train as one device does on them."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.support import processes

ROOT = Path(__file__).parent.parent

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
pytestmark = [pytest.mark.long, on_tensorflow]


@pytest.fixture(scope="module")
def found():
    done = processes.run(["-m", "tests.support.mirrored_suite"], cwd=ROOT, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("router", ["top_k", "bias_balanced"])
@pytest.mark.parametrize("weighting", [False, True])
def test_two_replicas_train_as_one_device(found, weighting, router):
    """With a weighting, 13.3182 was shown where one device had 7.4626."""
    one, two = found[f"{weighting}, {router}"]
    for part in ("history", "measured"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            np.testing.assert_allclose(
                two[part][name], value, rtol=1e-5, err_msg=f"{part}: {name}"
            )
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert one["history"]["click_loss"][0] > 0
    assert one["history"]["seen_loss"] == [0.0] * 3


def test_a_task_that_one_replica_knows_is_known(found):
    """Its "+ s" was counted for the replicas with rows alone."""
    one, two = found["one-sided"]
    for name, values in one["history"].items():
        np.testing.assert_allclose(two["history"][name], values, rtol=1e-5)
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", [None, "pcgrad", "upgrad"])
def test_declared_tasks_are_means_over_the_rows_of_all_replicas(found, weighting):
    """The defined rows differ in number, and one task has none."""
    one, two = found[f"tasks, {weighting}"]
    for part in ("history", "measured"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            np.testing.assert_allclose(
                two[part][name], value, rtol=1e-4, err_msg=f"{part}: {name}"
            )
    # A solver of UPGrad is iterative.
    tolerance = 1e-3 if weighting == "upgrad" else 1e-5
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-5)
    assert one["history"]["never_loss"] == [0.0] * 3


def test_a_loss_over_all_impressions_is_that_of_all_replicas(found):
    one, two = found["clicks"]
    for name, values in one["history"].items():
        np.testing.assert_allclose(
            two["history"][name], values, rtol=1e-5, err_msg=name
        )
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_bias_follows_the_load_of_all_replicas(found):
    """Each replica had moved its own bias, and the mean of them was kept."""
    one, two = found["halves"]
    np.testing.assert_allclose(two["bias"], one["bias"], atol=1e-6)
    assert np.ptp(one["bias"]) > 0.05
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_the_rows_of_all_replicas(found):
    one, two = found["metrics"]
    assert one.keys() == two.keys()
    assert 0 < one["gauc"] < 1
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, err_msg=name)


def test_every_layer_trains_as_on_one_device(found):
    """Distinct rows on each replica; the router's biases count the rows of both."""
    one, two = found["layers"]
    pairs = zip(one["weights"], two["weights"], strict=True)
    for path, (value, other) in zip(one["paths"], pairs, strict=True):
        np.testing.assert_allclose(other, value, rtol=1e-4, atol=1e-5, err_msg=path)
        if path.startswith("balanced/") and path.endswith("expert_bias"):
            assert np.ptp(value) > 0
    assert one["history"].keys() == two["history"].keys()
    for name, values in one["history"].items():
        np.testing.assert_allclose(
            two["history"][name], values, rtol=1e-5, err_msg=name
        )


def test_xla_on_replicas_is_refused_by_name(found):
    assert len(found["refused"]) == 2
    for message, name in zip(found["refused"], ["MultiTaskModel", "MMoE"], strict=True):
        assert "`jit_compile` must not be True under MirroredStrategy" in message
        assert f"compile {name} with jit_compile=False" in message
        assert "Received: jit_compile=True" in message
