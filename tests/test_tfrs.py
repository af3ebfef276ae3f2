"""`keras_moe.tfrs`, in processes whose `tf.keras` is Keras 2."""

import importlib.util
from pathlib import Path

import keras
import pytest

from tests.support import processes

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="Keras 2 knows TensorFlow only"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_recommenders") is None,
        reason="tensorflow-recommenders is not installed",
    ),
]


def test_the_suite():
    done = processes.run(
        [
            "-m",
            "pytest",
            "-n",
            "0",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/support/tfrs_suite.py",
        ],
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


IMPORT = (
    "import keras_moe.tfrs, tensorflow_recommenders, keras; print(keras.__version__)"
)


@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        (
            f"import tensorflow as tf; tf.keras.layers; {IMPORT}",
            {},
            "set TF_USE_LEGACY_KERAS=1 before Python starts, or import keras_moe.tfrs",
        ),
        (IMPORT, {"TF_USE_LEGACY_KERAS": "0"}, "set TF_USE_LEGACY_KERAS=1 before"),
        (IMPORT, {"KERAS_BACKEND": "jax"}, "needs KERAS_BACKEND=tensorflow; the"),
        (
            f"import sys; sys.modules['tf_keras'] = None; {IMPORT}",
            {},
            r"pip install tensorflow-recommenders tf_keras",
        ),
    ],
)
def test_else_one_line_says_what_to_set(code, environment, message):
    done = processes.run(["-c", code], cwd=ROOT, **environment)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("ImportError: keras_moe.tfrs needs ")
    assert message in last
