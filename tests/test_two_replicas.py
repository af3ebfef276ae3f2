"""The quick part of `test_mirrored.py`, which is a long test."""

import json

from tests import test_mirrored
from tests.support import processes

pytestmark = test_mirrored.on_tensorflow


def test_two_replicas_train_as_one_device():
    done = processes.run(
        ["-m", "tests.support.mirrored_suite", "quick"], cwd=test_mirrored.ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    test_mirrored.test_two_replicas_train_as_one_device(found, True, "top_k")
    test_mirrored.test_a_bias_follows_the_load_of_all_replicas(found)
