"""The form of mixtures for a TPU, on a CPU: the numbers of the form for other devices.

Axis letters: n rows, d input features, e experts, u output units.
"""

import re
import types

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import _backend, _mesh
from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import CGC, PLE, AdaTT, DSelectK, MMoE, OMoE
from tests.support import backends, checks

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="a TPU needs JAX"
)
D, U = 6, 5
LAYERS = {
    "MMoE": lambda **given: MMoE(4, (7, U), 3, **given),
    "MMoE, one expert": lambda **given: MMoE(1, U, 2, **given),
    "MMoE, top k": lambda **given: MMoE(4, U, 2, top_k=2, dispatch="dense", **given),
    "MMoE of GLU": lambda **given: MMoE(None, None, 2, experts=_glu(**given), **given),
    "OMoE": lambda **given: OMoE(4, U, ["a", "b"], **given),
    "CGC": lambda **given: CGC(0, 2, U, ["a", "b"], **given),
    "PLE": lambda **given: PLE(2, 1, 2, (7, U), 2, gate_units=(4,), **given),
    "PLE, no task experts": lambda **given: PLE(2, 3, 0, U, 2, **given),
    "DSelectK": lambda **given: DSelectK(5, U, 2, **given),
    "DSelectK, static": lambda **given: DSelectK(4, U, 2, static=True, **given),
    "AdaTT": lambda **given: AdaTT(2, 1, U, 2, num_shared_experts=2, **given),
}


def _glu(**given):
    return GLUExperts(4, 7, U, use_bias=True, **given)


@pytest.fixture
def forms(monkeypatch):
    """A function that sets the form, "tpu" or "other", and returns its uses."""

    def choose(form):
        chosen = []

        def on_tpu_or(tpu, other, *tensors):
            chosen.append(form)
            return (tpu if form == "tpu" else other)(*tensors)

        monkeypatch.setattr(_backend, "on_tpu_or", on_tpu_or)
        return chosen

    return choose


def _built(make, shape, dtype="float64"):
    layer = make(dtype=dtype)
    layer.build(shape)
    checks.randomised(layer)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_other_form(name, forms):
    x = checks.rows(9, D)
    layer = _built(LAYERS[name], x.shape)
    cotangents = [checks.rows(9, U, seed=i) for i in range(len(layer.tasks))]
    found = {}
    for form in ("tpu", "other"):
        chosen = forms(form)
        found[form] = backends.outputs_and_gradients(layer, [x], cotangents)
        assert chosen
    for a, b in zip(*map(keras.tree.flatten, found.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    outputs, by_weight, by_input = found["tpu"]
    assert all(np.abs(y).max() > 0 for y in outputs)
    assert len(by_weight) == len(layer.trainable_variables)
    assert len(by_input) == 1


@pytest.mark.parametrize("name", ["MMoE", "PLE", "DSelectK, static"])
@pytest.mark.parametrize("leading", [(2, 3), (0,)])
def test_further_axes_are_rows(name, leading, forms):
    x = checks.rows(*leading, D)
    layer = _built(LAYERS[name], x.shape)
    found = []
    for form in ("tpu", "other"):
        forms(form)
        found.append(checks.arrays(backends.call(layer, x)))
    for a, b in zip(*found, strict=True):
        assert a.shape == (*leading, U)
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", ["MMoE", "PLE"])
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_has_the_dtypes_and_about_the_numbers(name, dtype, forms):
    """A mixture is summed in float32 in both forms and rounded once."""
    x = checks.rows(9, D).astype("float32")
    layer = _built(LAYERS[name], x.shape, dtype)
    found = []
    for form in ("tpu", "other"):
        forms(form)
        outputs = keras.tree.flatten(backends.call(layer, x))
        assert {y.dtype for y in outputs} == {np.dtype(layer.compute_dtype)}
        found.append([checks.array(ops.cast(y, "float32")) for y in outputs])
    tolerance = {"mixed_bfloat16": 0.1, "mixed_float16": 0.02}[dtype]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * abs(b).max())


def test_a_sum_in_half_precision_is_rounded_once(forms):
    """Rounded after each term to the steps of 2 that bfloat16 has here, it is 260."""
    layer = MMoE(3, 1, 1, use_bias=True, dtype="mixed_bfloat16", activation=None)
    x = np.ones((2, D), "float32")
    layer.build(x.shape)
    layer.gates.kernels[0].assign(np.zeros(layer.gates.kernels[0].shape))
    layer.experts.kernels[0].assign(np.zeros((3, D, 1)))
    # Gates of 1 / 3, in bfloat16 0.33398: 256.5 + 1.002 + 1.002 = 258.5.
    layer.experts.biases[0].assign([[768.0], [3.0], [3.0]])
    forms("tpu")
    (found,) = keras.tree.flatten(backends.call(layer, x))
    assert checks.array(ops.cast(found, "float32")).tolist() == [[258.0]] * 2


@pytest.mark.parametrize(
    ("name", "make", "training"),
    [
        ("dropout", lambda: MMoE(3, (7, U), 2, dropout=0.5), True),
        ("own layers", lambda: MMoE(2, None, 2, experts=_layers()), False),
        ("activity regularizer", lambda: MMoE(3, None, 2, experts=_regular()), False),
        ("another dtype", lambda: MMoE(3, None, 2, experts=_in_half()), False),
        ("a subclass", lambda: MMoE(3, None, 2, experts=_Doubled(3, U)), False),
    ],
)
def test_what_has_only_the_other_form(name, make, training, forms):
    layer = make()
    chosen = forms("tpu")
    backends.call(layer, checks.rows(4, D).astype("float32"), training=training)
    assert not chosen, name


class _Doubled(MLPExperts):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training)


def _layers():
    return LayerExperts([keras.layers.Dense(U), keras.layers.Dense(U)])


def _regular():
    return MLPExperts(3, U, activity_regularizer="l2")


def _in_half():
    return MLPExperts(3, U, dtype="bfloat16")


@pytest.mark.parametrize(("axis", "in_turn"), [(None, True), ("expert", False)])
def test_experts_split_over_devices_are_computed_side_by_side(
    axis, in_turn, forms, monkeypatch
):
    """In turn, all devices would wait for the one that has the expert."""

    class Distribution:
        device_mesh = types.SimpleNamespace(backend_mesh=None)
        batch_dim_name = "batch"

        def get_variable_layout(self, variable):
            axes = (axis, *[None] * (len(variable.shape) - 1))
            return keras.distribution.TensorLayout(axes)

    layer = _built(LAYERS["MMoE"], (4, D), "float32")
    monkeypatch.setattr(_mesh, "active", Distribution)
    chosen = forms("tpu")
    backends.call(layer, checks.rows(4, D).astype("float32"))
    assert bool(chosen) == in_turn


def test_dropout_that_is_not_active_is_no_reason(forms):
    layer = MMoE(3, (7, U), 2, dropout=0.5)
    chosen = forms("tpu")
    backends.call(layer, checks.rows(4, D).astype("float32"), training=False)
    assert chosen


def test_a_call_that_is_not_traced_has_only_the_other_form(forms):
    x = checks.rows(4, D).astype("float32")
    layer = _built(LAYERS["PLE"], x.shape, "float32")
    chosen = forms("tpu")
    layer(ops.convert_to_tensor(x))
    assert not chosen


@pytest.mark.parametrize("name", ["MMoE", "PLE"])
def test_the_device_of_the_program_decides(name):
    """(n, e, u) is no tensor of the program for a TPU; the batch size is symbolic."""
    import jax
    from jax import export

    layer = _built(LAYERS[name], (None, D), "float32")
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, D), "float32")

    def program(*platforms):
        call = jax.jit(lambda x: keras.tree.flatten(layer(x)))
        return export.export(call, platforms=platforms)(x)

    e = keras.tree.flatten(layer.experts)[0].num_experts
    texts = {p: program(p).mlir_module() for p in ("tpu", "cpu")}
    stacked = re.compile(rf"tensor<\?x{e}x{U}xf32>")
    assert not stacked.search(texts["tpu"])
    assert stacked.search(texts["cpu"])
    rows = checks.rows(11, D).astype("float32")
    wanted = checks.arrays(backends.call(layer, rows))
    # One program for both: the device on which it runs decides.
    for a, b in zip(program("cpu", "tpu").call(rows), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_mask_excludes_the_same_rows_from_losses(forms):
    """Of DSelectK with 5 experts: 3 of 8 codes have none, which is a loss."""
    import jax

    x = checks.rows(9, D)
    layer = _built(LAYERS["DSelectK"], x.shape)
    mask = np.arange(9) % 3 > 0
    found = []

    def step(x, mask):
        state = [
            [v.value for v in variables]
            for variables in (layer.trainable_variables, layer.non_trainable_variables)
        ]
        outputs, _, losses = layer.stateless_call(
            *state, x, mask=mask, return_losses=True
        )
        return outputs, losses

    for form in ("tpu", "other"):
        forms(form)
        found.append(checks.arrays(jax.jit(lambda *xs: step(*xs))(x, mask)))
    assert len(found[0]) == 3
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_a_model_trains_the_same(forms):
    """`fit` with a mask of the inputs, on names of tasks."""
    x = checks.rows(16, 4, D).astype("float32")
    x[:, 2:] = 0.0
    losses = []
    for form in ("tpu", "other"):
        forms(form)
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4, D))
        masked = keras.layers.Masking()(inputs)
        outputs = LAYERS["CGC"]()(masked)
        model = keras.Model(inputs, outputs)
        model.compile("sgd", {"a": "mse", "b": "mse"})
        y = {"a": x[..., :U], "b": -x[..., :U]}
        history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("name", ["MMoE", "PLE"])
def test_a_recomputed_forward_pass(name):
    """`keras.remat` traces both forms once more."""
    import jax

    x = checks.rows(9, D)
    layer = _built(LAYERS[name], x.shape)

    def loss(x, remat):
        call = keras.remat(layer) if remat else layer
        return sum(ops.sum(y**2) for y in keras.tree.flatten(call(x)))

    gradients = [
        jax.jit(jax.grad(lambda x, remat=remat: loss(x, remat)))(x)
        for remat in (False, True)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-10)
