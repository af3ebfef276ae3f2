"""Loss weightings: the rules for all, and each against its oracle, step by step."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.multitask import UncertaintyWeighting, weighting
from keras_moe.multitask.weighting import (
    DWA,
    FAMO,
    RLW,
    DecayingWeighting,
    FixedWeighting,
    GradNorm,
    LossWeighting,
)
from tests.support import backends
from tests.support import weighting_oracles as oracles
from tests.support.checks import array

T = 3
MAKERS = {
    "fixed": lambda **k: FixedWeighting([1.0, 0.0, 2.5], **k),
    "uncertainty": UncertaintyWeighting,
    "dwa": lambda **k: DWA(steps=1, temperature=0.5, **k),
    "rlw": lambda **k: RLW(seed=1, **k),
    "famo": FAMO,
    "decay": lambda **k: DecayingWeighting([1.0, 2.0, 0.5], [0.5, 1.0, 2.0], 1, **k),
}
all_weightings = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
LOSSES = np.random.default_rng(0).uniform(0.1, 2.0, size=(8, T))


class Call(keras.layers.Layer):
    """A layer called with a mask, for gradients by the losses."""

    def __init__(self, layer, mask):
        super().__init__(dtype="float64")
        self.layer, self.mask = layer, mask
        self.built = True

    def call(self, losses):
        return self.layer(losses, mask=self.mask)


def by_losses(layer, losses, mask=None):
    """The gradient of the total by the losses, without a change of the state."""
    if not layer.built:
        layer.build(losses.shape)
    mask = np.ones(len(losses), bool) if mask is None else mask
    return backends.gradients(Call(layer, mask), [losses], [1.0])[1][0]


def state(layer):
    return [array(v) for v in layer.non_trainable_variables]


def run_step(layer, losses, mask=None, new=None):
    """One training step, with an update after it if the layer needs one."""
    total = layer(losses, mask=mask, training=True)
    if layer.needs_new_losses:
        layer.update(losses, losses * 0.9 if new is None else new, mask=mask)
    return float(array(total))


def trained(make):
    layer = make(dtype="float64")
    for row in LOSSES[:3]:
        run_step(layer, row, new=row[::-1] * 0.8)
    return layer


@all_weightings
@pytest.mark.parametrize("undefined", [np.nan, np.inf, 7.0])
def test_a_task_outside_the_mask_adds_nothing(make, undefined):
    mask = np.array([True, False, True])
    one, two = trained(make), trained(make)
    zero, other = LOSSES[5].copy(), LOSSES[5].copy()
    zero[1], other[1] = 0.0, undefined
    expected = by_losses(one, zero, mask)
    seen = by_losses(one, other, mask)
    np.testing.assert_array_equal(seen, expected)
    assert seen[1] == 0.0
    assert np.isfinite(seen).all()
    before = {v.path: array(v) for v in two.non_trainable_variables}
    totals = [run_step(one, zero, mask), run_step(two, other, mask)]
    assert totals[0] == totals[1]
    for first, second, old in zip(state(one), state(two), before.values(), strict=True):
        np.testing.assert_array_equal(first, second)
        if isinstance(one, FAMO):
            assert second[1] == old[1]
    assert run_step(one, other, np.zeros(T, bool)) == 0.0


@all_weightings
def test_the_state_changes_in_training_only_and_stays_finite(make):
    layer = trained(make)
    before = state(layer)
    total = float(array(layer(LOSSES[4])))
    assert float(array(layer(LOSSES[4], training=False))) == total
    for bad in (np.nan, np.inf):
        broken = LOSSES[4].copy()
        broken[0] = bad
        run_step(layer, broken)
        if isinstance(layer, FAMO):
            layer.update(LOSSES[4], broken)
            layer.update(broken, LOSSES[4])
    if not isinstance(layer, RLW):  # Its random generator goes on.
        for now, old in zip(state(layer), before, strict=True):
            np.testing.assert_array_equal(now, old)
    assert float(array(layer(LOSSES[4]))) == total
    if isinstance(layer, DWA | FAMO | DecayingWeighting):
        run_step(layer, LOSSES[5])
        assert float(array(layer(LOSSES[4]))) != total


@all_weightings
def test_config_files_and_dtypes(make, tmp_path):
    layer = make()
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    assert layer.compute_output_shape((T,)) == ()
    assert array(make(dtype="mixed_float16")(LOSSES[0])).dtype == "float32"

    class Holder(keras.Model):
        def __init__(self, part):
            super().__init__()
            self.part = part
            self.built = True

    layer = trained(make)
    Holder(layer).save_weights(tmp_path / "state.weights.h5")
    again = make(dtype="float64")
    again.build((T,))
    Holder(again).load_weights(tmp_path / "state.weights.h5")
    if isinstance(layer, RLW):
        return  # Keras saves no state of random generators.
    for row in LOSSES[3:6]:
        assert run_step(again, row) == run_step(layer, row)


@all_weightings
def test_compiled_steps_are_those_of_eager_mode(make):
    if make is MAKERS["rlw"]:
        # XLA draws other numbers, but their sum is the same.
        for run in compiled_steps(make):
            ones = np.ones(T)
            np.testing.assert_allclose(run([(ones, ones)]), [T], rtol=1e-5)
        return
    eager = make(dtype="float64")
    expected = [run_step(eager, row, new=row[::-1]) for row in LOSSES[:3]]
    for run in compiled_steps(make):
        seen = run([(row, row[::-1]) for row in LOSSES[:3]])
        np.testing.assert_allclose(seen, expected, rtol=1e-5)


def compiled_steps(make):
    """Functions that run training steps, compiled, and return their totals."""

    def step(layer, losses, new):
        total = layer(losses, training=True)
        if layer.needs_new_losses:
            layer.update(losses, new)
        return total

    def on_tensorflow(xla):
        import tensorflow as tf

        layer = make(dtype="float64")
        layer.build((T,))
        call = tf.function(lambda *x: step(layer, *x), jit_compile=xla)
        return lambda rows: [float(call(*map(tf.constant, row))) for row in rows]

    def on_jax(rows):
        import jax

        layer = make(dtype="float64")
        layer.build((T,))

        @jax.jit
        def call(values, *row):
            pairs = list(zip(layer.variables, values, strict=True))
            with keras.StatelessScope(state_mapping=pairs) as scope:
                total = step(layer, *row)
            values = [scope.get_current_value(v) for v in layer.variables]
            return total, values

        values, totals = [v.value for v in layer.variables], []
        for row in rows:
            total, values = call(values, *row)
            totals.append(float(total))
        return totals

    backend = keras.backend.backend()
    if backend == "tensorflow":
        return [on_tensorflow(False), on_tensorflow(True)]
    return [on_jax] if backend == "jax" else []


def test_fixed_weights_by_hand():
    """1 * 2 + 0 * 3 + 2.5 * 4 = 12."""
    layer = MAKERS["fixed"](dtype="float64")
    losses = np.array([2.0, 3.0, 4.0])
    assert float(array(layer(losses))) == 12.0
    np.testing.assert_array_equal(by_losses(layer, losses), [1.0, 0.0, 2.5])


def test_decaying_weights_by_hand():
    """Windows of 2 steps: 2, 2, 1, 1, 0.5 for the first task; 1 for the second."""
    layer = DecayingWeighting([2.0, 1.0], [0.5, 1.0], steps=2)
    losses = np.array([1.0, 10.0])
    totals = [run_step(layer, losses) for _ in range(5)]
    np.testing.assert_allclose(totals, [12.0, 12.0, 11.0, 11.0, 10.5])
    assert float(array(layer.windows)) == 2.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_dwa_is_its_oracle_in_every_step(steps):
    rng = np.random.default_rng(steps)
    losses = rng.uniform(0.2, 2.0, size=(12, T))
    defined = rng.uniform(size=(12, T)) < 0.6
    expected = oracles.dwa(losses, defined, steps, 0.7)
    layer = DWA(steps, temperature=0.7, dtype="float64")
    np.testing.assert_array_equal(expected[0], np.ones(T))
    for row, mask, weights in zip(losses, defined, expected, strict=True):
        np.testing.assert_allclose(by_losses(layer, row), weights, rtol=1e-5)
        total = run_step(layer, row, mask)
        np.testing.assert_allclose(total, weights[mask] @ row[mask], rtol=1e-5)


def test_dwa_of_losses_that_were_zero():
    layer = DWA(steps=1, dtype="float64")
    for row in ([0.0, 1.0, 1e-300], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]):
        total = run_step(layer, np.array(row))
    assert np.isfinite(total)


def test_rlw_draws_weights_that_sum_to_t():
    for distribution in ("normal", "dirichlet"):
        layer = RLW(distribution, seed=2)
        twin = RLW(distribution, seed=2)
        one_hot = np.eye(T)
        np.testing.assert_allclose(run_step(layer, np.ones(T)), T, rtol=1e-5)
        run_step(twin, np.ones(T))
        seen = [run_step(layer, one_hot[0]) for _ in range(300)]
        assert seen[:5] == [run_step(twin, one_hot[0]) for _ in range(5)]
        assert min(seen) > 0
        assert abs(np.mean(seen) - 1.0) < 0.15
        assert np.std(seen) > 0.3
        assert float(array(layer(one_hot[0]))) == 1.0


def test_famo_is_its_oracle_in_every_step():
    least = np.array([0.0, 0.05, -1.0])
    layer = FAMO(0.1, weight_decay=0.01, min_losses=list(least), dtype="float64")
    oracle = oracles.FAMO(T, 0.1, 0.01, least)
    for old, new in itertools.pairwise(LOSSES):
        expected = oracles.famo_weights(oracle.logits, old, least)
        np.testing.assert_allclose(by_losses(layer, old), expected, rtol=1e-5)
        # total = sum_i z_i log(l_i - b_i) / sum_i z_i / (l_i - b_i)
        total = expected @ ((old - least) * np.log(old - least))
        seen = run_step(layer, old, new=new)
        np.testing.assert_allclose(seen, total, rtol=1e-5, atol=1e-6)
        oracle.update(old, new)
        np.testing.assert_allclose(
            array(layer.logits), oracle.logits, rtol=1e-4, atol=1e-6
        )


def test_famo_of_some_tasks_is_famo_without_the_others():
    mask = np.array([True, False, True])
    whole, part = FAMO(dtype="float64"), FAMO(dtype="float64")
    for row in LOSSES[:4]:
        total = run_step(whole, row, mask, new=row[::-1])
        alone = run_step(part, row[mask], new=row[::-1][mask])
        np.testing.assert_allclose(total, alone, rtol=1e-9)
    logits = array(whole.logits)
    np.testing.assert_allclose(logits[mask], array(part.logits), rtol=1e-9)
    assert logits[1] == 0.0


def test_gradnorm_is_its_oracle_in_every_step():
    rng = np.random.default_rng(3)
    layer = GradNorm(alpha=1.2, learning_rate=0.05, dtype="float64")
    weights = np.ones(T)
    for step, losses in enumerate(LOSSES):
        gradients = rng.normal(size=(T, 9)) * [[1.0], [0.3], [4.0]]
        gramian = gradients @ gradients.T
        np.testing.assert_allclose(array(layer(gramian)), weights, rtol=1e-5)
        used = array(layer(gramian, losses, training=True))
        np.testing.assert_allclose(used, weights, rtol=1e-5)
        weights = oracles.gradnorm_step(
            weights, gradients, losses, LOSSES[0], 1.2, 0.05
        )
        np.testing.assert_allclose(weights.sum(), T)
        np.testing.assert_allclose(
            array(layer.loss_weights), weights, rtol=1e-5, err_msg=f"step {step}"
        )


def test_gradnorm_of_undefined_tasks_and_bad_losses():
    layer = GradNorm(dtype="float64")
    mask = np.array([True, True, False])
    gramian = np.diag([1.0, 4.0, np.nan])
    layer(gramian, np.array([1.0, 2.0, np.nan]), mask=mask, training=True)
    seen = array(layer.loss_weights)
    assert seen[2] == 1.0
    assert seen[1] < 1.0 < seen[0]
    np.testing.assert_allclose(seen[:2].sum(), 2.0)
    np.testing.assert_array_equal(array(layer.first_losses), [1.0, 2.0, np.nan])
    for bad in ([np.nan, 1.0, 1.0], [np.inf, 1.0, 1.0]):
        layer(np.eye(T), np.array(bad), training=True)
    layer(gramian, np.ones(T), training=True)
    np.testing.assert_array_equal(array(layer.loss_weights), seen)
    np.testing.assert_array_equal(array(layer.first_losses), [1.0, 2.0, np.nan])
    layer(np.eye(T), np.array([1.0, 0.0, 3.0]), training=True)
    np.testing.assert_array_equal(array(layer.first_losses), [1.0, 2.0, 3.0])
    assert np.isfinite(array(layer.loss_weights)).all()
    with pytest.raises(ValueError, match="`task_losses` must be given"):
        layer(np.eye(T), training=True)


def test_get():
    assert weighting.get(None) is None
    for name, kind in weighting.KNOWN.items():
        assert type(weighting.get(name)) is kind
    layer = DWA(5)
    assert weighting.get(layer) is layer
    assert weighting.get(keras.saving.serialize_keras_object(layer)).steps == 5
    for wrong in ("dwa", 3, RLW):
        with pytest.raises(ValueError, match=r"one of \['famo', .*Received"):
            weighting.get(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedWeighting([0.0, 0.0]), "`weights` must not be all 0"),
        (lambda: FixedWeighting([1.0, -1.0]), r"`weights\[1\]` must be a finite"),
        (lambda: FixedWeighting(3), "`weights` must be a sequence"),
        (lambda: FixedWeighting([1.0])(np.ones(2)), "one element for each of the 2"),
        (lambda: DecayingWeighting([1.0], [0.5, 0.5], 1), "`decay` must have one"),
        (lambda: DecayingWeighting([1.0], [0.0], 1), r"`decay\[0\]` must be"),
        (lambda: DWA(0), "`steps` must be an integer >= 1"),
        (lambda: DWA(1, temperature=0), "`temperature` must be a finite number > 0"),
        (lambda: RLW("gamma"), "`distribution` must be one of"),
        (lambda: FAMO(learning_rate=-1), "`learning_rate` must be a finite"),
        (lambda: FAMO(min_losses="a"), r"`min_losses` must be a sequence"),
        (lambda: FAMO(min_losses=[0.0])(np.ones(2)), "`min_losses` must have one"),
        (lambda: GradNorm(alpha=-0.5), "`alpha` must be a finite number >= 0"),
        (lambda: DWA(1)(np.ones((2, 2))), "`task_losses` must have the shape"),
        (lambda: RLW()(np.ones(2), mask=np.ones(3, bool)), "`mask` must have the"),
        (lambda: LossWeighting()(np.ones(2)), "must implement `weights_of`"),
    ],
)
def test_invalid_arguments(make, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()


def test_flags_for_the_train_step():
    assert FAMO.needs_new_losses
    assert not LossWeighting.needs_new_losses
    assert GradNorm.scales_losses
    assert ops.shape(array(GradNorm()(np.eye(2)))) == (2,)


def test_famo_is_nan_below_its_minimum():
    """Its gradient would have the wrong sign."""
    for losses, finite in (([0.7, 0.5], True), ([0.7, -0.5], False)):
        total = float(FAMO()(np.array(losses, "float32")))
        assert np.isfinite(total) == finite
    assert np.isfinite(float(FAMO(min_losses=-1.0)(np.array([0.7, -0.5], "float32"))))
