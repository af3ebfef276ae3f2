"""Programs for NVIDIA GPUs, made without one: lowered by JAX, and compiled by XLA."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.support import processes

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="started from TensorFlow's run"
)

LOWERING = """
import jax, keras, numpy as np
from jax import export
from keras_moe import _backend
from keras_moe.layers import MoE

_backend.on_accelerator = lambda: True
inputs = keras.Input((16,))
model = keras.Model(inputs, inputs + MoE(4, (32, 16), dtype="mixed_bfloat16")(inputs))
model.compile("adam", "mse", jit_compile=False)
x = np.ones((64, 16), "float32")
model._symbolic_build(data_batch=(x, x))
state = [
    [variable.value for variable in group]
    for group in (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
]
step = jax.jit(lambda state, data: model.train_step(state, data))
program = export.export(step, platforms=["cuda"])(state, (x, x))
assert program.platforms == ("cuda",)
text = program.mlir_module()
assert "stablehlo.while" in text and "stablehlo.dot_general" in text
found = export.deserialize(program.serialize())
print(found.platforms)
"""


def test_a_training_step_lowers_for_cuda():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    done = processes.run_without([], LOWERING, ROOT, KERAS_BACKEND="jax")
    assert done.splitlines()[-1] == "('cuda',)"


COMPILING = """
import os
from tests.benchmarks import gpu_programs as gpu

os.environ.update(gpu.SETTINGS)
from keras_moe import dispatch

sharding = gpu.on_h100()
dense = gpu.mlp(8192, sharding).compile()
program = gpu.mixture(dispatch.blocked_evenly, 8192, 8, sharding).compile()
text = program.as_text()
print(
    gpu.flops(text) / gpu.flops(dense.as_text()),
    gpu.kernel_bytes(text) / gpu.kernel_bytes(dense.as_text()),
    program.memory_analysis().temp_size_in_bytes
    / dense.memory_analysis().temp_size_in_bytes,
)
"""


def test_what_an_h100_would_run():
    """FLOPs, bytes and temporary memory beside the dense MLP of equal active FLOPs."""
    if importlib.util.find_spec("jax_plugins") is None or not importlib.util.find_spec(
        "jax_plugins.xla_cuda12"
    ):
        pytest.skip("jax-cuda12-plugin is not installed")
    done = processes.run_without([], COMPILING, ROOT)
    found = np.array(done.splitlines()[-1].split(), float)
    assert (found <= [1.25, 2.5, 3.0]).all(), found
