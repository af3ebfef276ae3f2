"""`FusedAdam` has the numbers of Keras' Adam and AdamW, and of the oracle."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.optimizers import FusedAdam
from tests.support import optimizer_oracles as oracles
from tests.support import optimizer_steps as steps
from tests.support.optimizer_steps import BETA_1, BETA_2, EPSILON, FORMS, RATE

SHAPES = {"dense/kernel": (5, 4), "dense/bias": (4,), "scale/scale": ()}
HYPER = (RATE, BETA_1, BETA_2, EPSILON)
DENSE = [form.removeprefix("dense").strip() for form in FORMS if "sparse" not in form]

CASES = {
    "plain": {},
    "betas": {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3},
    "decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "ema": {"use_ema": True, "ema_overwrite_frequency": 7},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, decay": {"gradient_accumulation_steps": 3, "weight_decay": 0.1},
    "loss scale": {"loss_scale_factor": 8.0},
    "amsgrad": {"amsgrad": True},
}


def weights(dtype="float32"):
    rng = np.random.default_rng(5)
    return [steps.variable(rng.normal(size=s), p, dtype) for p, s in SHAPES.items()]


def gradients(count, dtype="float32"):
    """Of very different sizes, as the root of v and epsilon divide them."""
    rng = np.random.default_rng(0)
    return [
        [
            ops.convert_to_tensor(
                np.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-5, 2), dtype)
            )
            for s in SHAPES.values()
        ]
        for _ in range(count)
    ]


def compare(optimizer, twin, form, count=60, dtype="float32", **tolerance):
    mine, theirs = weights(dtype), weights(dtype)
    steps.train(optimizer, mine, gradients(count, dtype), form)
    steps.train(twin, theirs, gradients(count, dtype), form)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(
            steps.array(a).astype("float64"),
            steps.array(b).astype("float64"),
            **(tolerance or {"rtol": 1e-6, "atol": 1e-6}),
        )
    for a, b in zip(optimizer.variables, twin.variables, strict=True):
        assert a.path.split("/", 1)[1] == b.path.split("/", 1)[1]
        np.testing.assert_allclose(steps.array(a), steps.array(b), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("form", DENSE)
def test_equals_the_oracle(form, decay):
    mine, given = weights("float64"), gradients(20, "float64")
    before = [steps.array(weight).copy() for weight in mine]
    optimizer = FusedAdam(*HYPER, weight_decay=decay or None)
    steps.train(optimizer, mine, given, form)
    for i, (weight, value) in enumerate(zip(mine, before, strict=True)):
        by_step = [steps.array(step[i]) for step in given]
        wanted = oracles.adam(value, by_step, *HYPER, decay)
        found = [weight, *optimizer.variables[2 + 2 * i : 4 + 2 * i]]
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(steps.array(a), b, **steps.EXACT)


@pytest.mark.parametrize("form", DENSE)
@pytest.mark.parametrize("case", CASES)
def test_equals_adam_of_keras(case, form):
    arguments = dict(CASES[case])
    kind = keras.optimizers.AdamW if "decay" in case else keras.optimizers.Adam
    # JAX compiles a condition in every step of accumulation.
    count = 60 if keras.backend.backend() != "jax" else 7
    compare(FusedAdam(0.01, **arguments), kind(0.01, **arguments), form, count)


@pytest.mark.parametrize("form", DENSE)
def test_a_thousand_steps_with_a_schedule(form):
    def schedule():
        return keras.optimizers.schedules.CosineDecay(1e-3, 900, warmup_steps=100)

    count = 1000 if form else 200  # Steps without a graph are slow.
    twin = keras.optimizers.Adam(schedule())
    compare(FusedAdam(schedule()), twin, form, count)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("form", DENSE)
def test_variables_of_other_dtypes(form, dtype):
    if dtype != "float64" and keras.backend.backend() == "torch":
        pytest.skip("Keras rounds each operation there, and not the same ones")
    twin = keras.optimizers.Adam(0.01, epsilon=1e-3)
    compare(FusedAdam(0.01, epsilon=1e-3), twin, form, 10, dtype, rtol=1e-3, atol=1e-6)


def test_excluded_variables_do_not_decay():
    mine = weights()
    optimizer = FusedAdam(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"], var_list=[mine[2]])
    twin = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    theirs = weights()
    twin.exclude_from_weight_decay(var_names=["bias"], var_list=[theirs[2]])
    given = gradients(5)
    steps.train(optimizer, mine, given)
    steps.train(twin, theirs, given)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(steps.array(a), steps.array(b), rtol=1e-6)


def test_averages_become_the_weights_at_the_end():
    found = []
    for kind in (FusedAdam, keras.optimizers.Adam):
        mine = weights()
        optimizer = kind(0.01, use_ema=True, ema_momentum=0.5)
        steps.train(optimizer, mine, gradients(5))
        optimizer.finalize_variable_values(mine)
        found.append([steps.array(weight) for weight in mine])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"clipnorm": 0.5},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 4.0},
        {"weight_decay": 0.1},
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_repeated_rows_of_a_sparse_gradient_are_summed(form, arguments):
    """Keras' Adam, too, has these numbers where the gradient is dense."""
    value, given = np.ones((9, 2)), oracles.table_steps(9, 2, 6)
    weight, twin = steps.variable(value), steps.variable(value)
    steps.train_table(FusedAdam(0.125, **arguments), weight, given, form)
    steps.train_table(keras.optimizers.Adam(0.125, **arguments), twin, given, "dense")
    np.testing.assert_allclose(steps.array(weight), steps.array(twin), rtol=1e-6)


@steps.on_tensorflow
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_update_is_one_operation_as_large_as_the_variable(amsgrad):
    import tensorflow as tf

    weight = steps.variable(np.zeros((7, 5)), "dense/kernel", "float32")
    optimizer = FusedAdam(amsgrad=amsgrad)
    optimizer.build([weight])
    apply = tf.function(lambda g: optimizer.apply([g], [weight]))
    graph = apply.get_concrete_function(tf.TensorSpec((7, 5))).graph
    large = [
        op.type
        for op in graph.get_operations()
        if any(output.shape == (7, 5) for output in op.outputs)
    ]
    assert {*large} <= {"Placeholder", "Identity", "IdentityN"}  # No copies.
    kernel = "ResourceApplyAdamWithAmsgrad" if amsgrad else "ResourceApplyAdam"
    assert [op.type for op in graph.get_operations()].count(kernel) == 1


def test_is_an_adam_with_its_own_config():
    optimizer = FusedAdam(0.25, beta_1=0.5, weight_decay=0.1, clipnorm=1.0)
    assert isinstance(optimizer, keras.optimizers.Adam)
    twin = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(twin) is FusedAdam
    assert twin.get_config() == optimizer.get_config()


def test_arguments_are_checked_by_keras():
    with pytest.raises(ValueError, match="Only one of `clipnorm`"):
        FusedAdam(clipnorm=1.0, clipvalue=1.0)
    with pytest.raises(ValueError, match="not recognized"):
        FusedAdam(momentum=1.0)
