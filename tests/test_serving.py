"""SavedModels served by what is not us: TensorFlow's C API, many callers at once."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_moe.layers import PLE, MMoE, MoE, Tower

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
)
C_SERVER = Path(__file__).parent / "support" / "c_api_server.py"
TASKS = ["click", "stars"]


def _multi_task(layer):
    inputs = keras.Input((8,), name="features")
    shared = layer(inputs)
    return keras.Model(inputs, {task: Tower((4,))(shared[task]) for task in TASKS})


def _sparse(dispatch):
    inputs = keras.Input((8,), name="features")
    mixed = MoE(6, (16, 8), top_k=2, dispatch=dispatch)(inputs)
    return keras.Model(inputs, {"score": Tower(())(mixed)})


MODELS = {
    "MMoE": lambda: _multi_task(MMoE(4, (16, 8), TASKS)),
    "sparse MMoE": lambda: _multi_task(MMoE(8, (16, 8), TASKS, top_k=2)),
    "PLE": lambda: _multi_task(PLE(2, 1, 1, (16, 8), TASKS)),
    "MoE, split": lambda: _sparse("split"),
    "MoE, blocked": lambda: _sparse("blocked"),
}


def _ports(folder):
    """Return the names that a server needs: of the input, and of each output."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    (given,) = signature.inputs.values()
    return given.name, {name: out.name for name, out in signature.outputs.items()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of libraries")
@pytest.mark.parametrize("name", MODELS)
def test_the_c_api_serves_it_to_many_callers(name, tmp_path):
    import tensorflow as tf

    model, folder = MODELS[name](), tmp_path / "model"
    model.export(folder, verbose=False)
    x = np.random.default_rng(0).normal(size=(130, 8)).astype("float32")
    x.tofile(tmp_path / "rows")
    given, outputs = _ports(folder)
    libraries = Path(tf.__file__).parent
    done = subprocess.run(
        [
            *(sys.executable, "-I", C_SERVER, libraries, folder, given, "8"),
            *(",".join(outputs.values()), tmp_path / "rows", tmp_path / "found"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "64 callers\n"
    found = np.fromfile(tmp_path / "found", "float32").reshape(len(outputs), 130, 1)
    expected = model(x)
    for served, task in zip(found, outputs, strict=True):
        np.testing.assert_allclose(served, expected[task], rtol=1e-4, atol=1e-5)
