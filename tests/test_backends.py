"""The layers on JAX, and on torch where it is installed: the same tests and files."""

import importlib.util
import json
from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_moe.layers import MMoE, SharedBottom, Tower
from keras_moe.multitask import MultiTaskModel
from tests.support import processes

ROOT = Path(__file__).parent.parent
CORE = {
    "layers": ("layers",),
    "parts": (
        "multitask",
        "test_experts.py",
        "test_initializers.py",
        "test_losses.py",
        "metrics",
        "test_remat.py",
        "routers",
        "test_routing.py",
        "test_upcycling.py",
    ),
    "dispatch": ("test_dispatch.py",),
}

# Most tests make programs of a moment, by the thousand; those of the dispatch read what
# the compiler makes of them, and have it optimise. An unknown flag would end the
# process, so only a release that is known to have these is told.
UNOPTIMISED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="started from TensorFlow's run"
)


def _needs(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")


@pytest.mark.parametrize("part", CORE)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_core_of_the_suite(backend, part, tmp_path):
    _needs(backend)
    tests = [str(ROOT / "tests" / name) for name in CORE[part]]
    quick = part != "dispatch" and metadata.version(backend).startswith("0.10.")
    done = processes.run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        timeout=2400,
        KERAS_BACKEND=backend,
        # Layers made alike in many tests are compiled once.
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
        XLA_FLAGS=UNOPTIMISED if quick else "",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


PREDICT = """
import json, sys
import keras, keras_moe
import numpy as np

folder = sys.argv[1]
model = keras.models.load_model(folder + "/model.keras")
outputs = model.predict(np.load(folder + "/x.npy"), verbose=0)
print(json.dumps({k: np.asarray(v).tolist() for k, v in outputs.items()}))
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_model_trained_on_tensorflow_gives_the_same_numbers(backend, tmp_path):
    _needs(backend)
    inputs = keras.Input((6,))
    shared = MMoE(4, (16, 8), ["click", "stay"], gate_units=(8,))(inputs)
    bottom = SharedBottom(8, ["click", "stay"])(inputs)
    outputs = {
        task: Tower((8,))(shared[task] + bottom[task]) for task in ("click", "stay")
    }
    model = MultiTaskModel(inputs, outputs)
    model.compile("adam", loss={"click": "mse", "stay": "mse"})
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model.fit(x, {"click": x[:, :1], "stay": x[:, 1:2]}, epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    done = processes.run(
        ["-c", PREDICT, str(tmp_path)], cwd=ROOT, KERAS_BACKEND=backend
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for task, expected in model.predict(x, verbose=0).items():
        np.testing.assert_allclose(found[task], expected, rtol=1e-4, atol=1e-5)
