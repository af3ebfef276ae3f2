"""The form of "ragged" for a TPU: its numbers in interpret mode, and its programs."""

import functools
import importlib.util
import json

import keras
import numpy as np
import pytest

from keras_moe import _backend
from keras_moe.dispatch import _compiled, _grouped_matmul, _tpu
from keras_moe.dispatch._rows import identity
from keras_moe.experts import GLUExperts, MLPExperts
from keras_moe.layers import MoE
from keras_moe.routing import SortedChoices
from tests.support import processes

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="a TPU needs JAX"
)


@pytest.fixture(autouse=True)
def programs_of_a_test():
    """No program that was traced under what another test has replaced."""
    _forget_programs()
    yield
    _forget_programs()


def _forget_programs():
    for function in (_grouped_matmul._forward, _grouped_matmul._gradient):
        _compiled._program(function).clear_cache()


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """The branch for a TPU, whose kernels are interpreted."""
    from jax.experimental import pallas

    call = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", call)
    monkeypatch.setattr(_backend, "on_tpu_or", lambda tpu, _, *args: tpu(*args))


def _runs(counts):
    ends = np.cumsum(counts)
    starts, ends = (_tensor(a, "int32") for a in (ends - counts, ends))
    return SortedChoices(None, None, starts, ends)


def _tensor(values, dtype=None):
    return keras.ops.convert_to_tensor(np.asarray(values), dtype)


def test_a_bias_that_is_not_finite_reaches_the_rows_of_its_expert_alone(kernels_on_cpu):
    """Runs of 3, 0, 4 and 1 rows: expert 2 has the rows 3 to 6."""
    bias = np.ones((4, 2))
    bias[1], bias[2, 0] = np.inf, np.nan
    rows, kernel = np.ones((8, 3)), np.ones((4, 3, 2))
    rows, kernel, bias = (_tensor(a, "float32") for a in (rows, kernel, bias))
    found = np.asarray(
        _tpu.affine((rows,), (kernel, bias), identity, _runs([3, 0, 4, 1]))
    )
    np.testing.assert_array_equal(found[[0, 1, 2, 7]], 4.0)
    np.testing.assert_array_equal(found[3:7], [[np.nan, 4.0]] * 4)


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        ([3, 0, 12, 1], 16),
        ([0, 0, 7, 0], 32),  # Rows of no expert follow.
        ([150, 0, 3, 103], 256),  # Two tiles, the last run across both.
        ([0, 0, 0, 0], 16),
    ],
)
def test_each_gradient_is_the_sum_over_the_own_rows(
    kernels_on_cpu, counts, rows, dtype, weights_dtype
):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(rows, 5)), rng.normal(size=(rows, 3))
    kernel, bias = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 3))
    tensors = [
        _tensor(x, dtype),
        _tensor(kernel, weights_dtype),
        _tensor(bias, weights_dtype),
        _tensor(upstream, dtype),
    ]
    x, kernel, bias, upstream = (
        np.asarray(keras.ops.cast(a, "float32"), "float64") for a in tensors
    )
    # Not a number in the rows of no expert: it must not reach a kernel.
    upstream[sum(counts) :] = np.nan
    tensors[3] = _tensor(upstream, dtype)
    runs = _runs(counts)
    outputs = _tpu.affine(tensors[:1], tensors[1:3], identity, runs)
    found = _tpu.affine_gradient(tensors[:1], tensors[1:3], identity, runs, tensors[3])
    wanted = [np.zeros_like(a) for a in (upstream, x, kernel, bias)]
    row = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            wanted[0][row] = x[row] @ kernel[expert] + bias[expert]
            wanted[1][row] = kernel[expert] @ upstream[row]
            wanted[2][expert] += np.outer(x[row], upstream[row])
            wanted[3][expert] += upstream[row]
            row += 1
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    dtypes = [dtype, dtype, weights_dtype, weights_dtype]
    for a, b, wanted_dtype in zip((outputs, *found), wanted, dtypes, strict=True):
        assert keras.backend.standardize_dtype(a.dtype) == wanted_dtype
        a = np.asarray(keras.ops.cast(a, "float32"))
        if len(a) == rows:
            a, b = a[:row], b[:row]
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=10 * tolerance)


@pytest.fixture
def simulated_kernels(monkeypatch):
    """Slower, but memory starts as NaN and a block may be written only once."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    interpret = tpu.InterpretParams(uninitialized_memory="nan")
    call = functools.partial(pallas.pallas_call, interpret=interpret)
    monkeypatch.setattr(pallas, "pallas_call", call)


@pytest.mark.parametrize(
    ("how", "m", "d", "u"),
    [("kernels_on_cpu", 300, 300, 200), ("simulated_kernels", 256, 256, 256)],
)
def test_wide_rows_are_computed_in_parts(how, m, d, u, request, monkeypatch):
    """Parts of 128 features and units, and tiles that experts share."""
    import jax

    from keras_moe.dispatch import _tpu_kernels

    request.getfixturevalue(how)
    monkeypatch.setattr(_tpu_kernels, "_LARGEST_PART", 128)
    counts = np.array([100, 0, 109, 30, 0])
    ends = np.cumsum(counts)
    rng = np.random.default_rng(0)
    shapes = [(m, d), (m, d), (5, d, u), (5, u), (m, u)]
    *inputs, upstream = (_tensor(rng.normal(size=s), "float32") for s in shapes)
    rows, weights = inputs[:2], inputs[2:]

    def product(a, b):
        return keras.ops.silu(a) * b

    def reference(a, b, kernel, bias):
        x = product(a, b)
        parts = [
            x[end - count : end] @ kernel[k] + bias[k]
            for k, (end, count) in enumerate(zip(ends, counts, strict=True))
        ]
        none = np.zeros((m - sum(counts), u), "float32")
        return keras.ops.concatenate([*parts, none])

    outputs, pull = jax.vjp(reference, *inputs)
    runs = _runs(counts)
    found = _tpu.affine(rows, weights, product, runs)
    gradients = _tpu.affine_gradient(rows, weights, product, runs, upstream)
    for a, b in zip((found, *gradients), (outputs, *pull(upstream)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def _step(layer, x):
    """Return outputs and gradients as a function, and its arguments."""
    import jax

    others = [v.value for v in layer.non_trainable_variables]

    def loss(trained, x):
        outputs, _ = layer.stateless_call(trained, others, x, training=True)
        return keras.ops.sum(outputs**2), outputs

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step, ([v.value for v in layer.trainable_variables], x)


def _layer(kind, dispatch, activation="relu", n=90):
    experts = (
        MLPExperts(5, (24, 7), activation)
        if kind == "MLP"
        else GLUExperts(5, 24, 7, activation)
    )
    layer = MoE(experts=experts, top_k=2, dispatch=dispatch)
    layer.build((n, 6))
    rng = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def _scaled_by_a_tensor(x):
    return x * keras.ops.cast(_SCALE, x.dtype)


_SCALE = np.arange(24.0, dtype="float32")


@pytest.mark.parametrize(
    ("prologue", "fits"),
    [
        ("relu", True),
        ("silu", True),
        ("softplus", True),
        ("tanh", True),
        ("elu", False),
        ("gelu", False),
        (_scaled_by_a_tensor, False),
    ],
)
def test_what_a_kernel_computes_beside_its_matmul(prologue, fits):
    """`elu` and `gelu` have functions that kernels lack."""
    import jax
    from jax import export

    prologue = keras.activations.get(prologue)
    rows = jax.ShapeDtypeStruct((128, 24), "bfloat16")
    assert _tpu.fits_kernels(prologue, [rows]) == fits
    shapes = [(128, 24), (4, 24, 8), (4, 8), (128, 8)]

    def step(rows, kernel, bias, upstream):
        weights, runs = (kernel, bias), _runs([30, 0, 40, 50])
        outputs = _tpu.affine((rows,), weights, prologue, runs)
        found = _tpu.affine_gradient((rows,), weights, prologue, runs, upstream)
        return outputs, found

    arguments = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    text = export.export(jax.jit(step), platforms=["tpu"])(*arguments).mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


@pytest.mark.parametrize(
    ("kind", "activation"), [("MLP", "relu"), ("MLP", "elu"), ("GLU", "silu")]
)
def test_a_layer_has_the_outputs_and_gradients_of_blocks(kind, activation, request):
    """90 rows: no tile divides 180 choices and their padding."""
    import jax

    x = _tensor(np.random.default_rng(1).normal(size=(90, 6)), "float32")
    wanted = _step(_layer(kind, "blocked", activation), x)
    wanted = wanted[0](*wanted[1])
    request.getfixturevalue("kernels_on_cpu")
    found = _step(_layer(kind, "ragged", activation), x)
    found = found[0](*found[1])
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dispatch", ["auto", "ragged"])
def test_the_device_of_the_program_decides(dispatch):
    """Not that of this host: kernels for a TPU, a loop for a CPU."""
    from jax import export

    step, arguments = _step(
        _layer("MLP", dispatch), _tensor(np.ones((90, 6), "float32"))
    )
    text = {
        name: export.export(step, platforms=[name])(*arguments).mlir_module()
        for name in ("tpu", "cpu")
    }
    # Two matmuls, each with its gradients by rows and by weights.
    assert text["tpu"].count("stablehlo.custom_call @tpu_custom_call") == 6
    assert "tpu_custom_call" not in text["cpu"]
    assert "stablehlo.while" in text["cpu"]


@pytest.mark.parametrize(
    ("rows", "experts", "tile"),
    [
        (5, 3, 16),
        (100, 8, 112),
        (129, 1, 128),
        (131072, 8, 512),
        (131072, 64, 256),
        (131072, 256, 128),
    ],
)
def test_tiles_of_rows(rows, experts, tile):
    from keras_moe.dispatch import _tpu_kernels

    assert _tpu_kernels.rows_per_tile(rows, experts) == tile


def test_the_compiler_of_a_tpu_counts_few_flops_more(tmp_path):
    """A small case of `tests.benchmarks.accelerators`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: `python -m tests.benchmarks setup tpu`")
    from tests.benchmarks import accelerators
    from tests.benchmarks.environments import ROOT

    common = accelerators.COMMON | {"rows": 2048, "features": 256, "device": "v5e"}
    cases = [
        common | {"layer": "dense", "hidden": 1024},
        common | {"layer": "MoE", "experts": 8, "hidden": 512, "dispatch": "auto"},
    ]
    dense, moe = (
        json.loads(
            processes.run(
                ["-m", "tests.benchmarks.tpu_programs", json.dumps(case)],
                ROOT,
                **accelerators.VARIABLES,
            ).stdout.splitlines()[-1]
        )
        for case in cases
    )
    assert len(moe["kernels"]) == 6
    assert moe["flops"] <= 1.35 * dense["flops"]
