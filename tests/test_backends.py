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
DISPATCH = ("test_dispatch.py",)
ALL = (
    "callbacks",
    "layers",
    "metrics",
    "multitask",
    "routers",
    "telemetry",
    "test_experts.py",
    "test_grow.py",
    "test_initializers.py",
    "test_losses.py",
    "test_remat.py",
    "test_revive.py",
    "test_routing.py",
    "test_upcycling.py",
)
# Over 7 s each on JAX: they run there with the long tests.
SLOW_ON_JAX = (
    "layers/test_adatt.py",
    "layers/test_cross_stitch.py",
    "layers/test_dselect_k.py",
    "layers/test_extraction.py",
    "layers/test_home.py",
    "layers/test_inputs.py",
    "layers/test_keras_checks.py",
    "layers/test_moe_experts.py",
    "layers/test_moe_routers.py",
    "layers/test_multi_gate.py",
    "layers/test_multi_gate_budget.py",
    "layers/test_pepnet.py",
    "layers/test_soft_moe.py",
    "layers/test_stem.py",
    "metrics/test_ranking.py",
    "multitask/test_declared_model.py",
    "multitask/test_entire_space.py",
    "multitask/test_heads.py",
    "multitask/test_task.py",
    "routers/test_hierarchical.py",
    "test_upcycling.py",
)
# Most programs of the tests run once, so XLA need not optimise them; the tests of the
# dispatch read what it makes of them. Only a release that is known to have these flags
# gets them, since an unknown one ends the process.
UNOPTIMISED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
OPTIONS = (
    "-q",
    *("-n", "0"),  # The programs that JAX has compiled serve all files.
    *("-p", "no:cacheprovider"),
    "--ignore-glob=*_arguments.py",  # Their checks do not depend on the backend.
)
RUNS = {
    "jax": ("jax", ALL, UNOPTIMISED),
    "jax-dispatch": (
        "jax",
        (
            *DISPATCH,
            "test_eager_on_jax.py",
            "test_tpu_kernels.py",
            "test_tpu_mixtures.py",
        ),
        "",
    ),
    "torch": ("torch", (*ALL, *DISPATCH), ""),
    # Long:
    "jax-all": ("jax", ALL, UNOPTIMISED),
    "torch-long": ("torch", ("callbacks",), ""),
}
LEFT_OUT = {"jax": SLOW_ON_JAX}
MARKERS = {"jax-all": "long or not long", "torch-long": "long"}

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="started from TensorFlow's run"
)


def _needs(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")


@pytest.mark.parametrize(
    "run",
    [pytest.param(run, marks=[pytest.mark.long] * (run in MARKERS)) for run in RUNS],
)
def test_layers_on_another_backend(run, tmp_path):
    backend, names, flags = RUNS[run]
    _needs(backend)
    if not metadata.version(backend).startswith("0.10."):
        flags = ""
    paths = [str(ROOT / "tests" / name) for name in names]
    for name in LEFT_OUT.get(run, ()):
        assert (ROOT / "tests" / name).is_file()
        paths.append(f"--ignore={ROOT / 'tests' / name}")
    done = processes.run(
        ["-m", "pytest", *OPTIONS, "-m", MARKERS.get(run, "not long"), *paths],
        cwd=ROOT,
        timeout=3600,
        KERAS_BACKEND=backend,
        # For what has been forgotten, see `_limit_compiled_programs`.
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
        XLA_FLAGS=flags,
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
