"""`keras.optimizers.MultiOptimizer`: one optimizer for tables, another for the rest."""

import keras
import numpy as np
import pytest

from keras_moe import optimizers
from tests.optimizers.test_optimizers_in_models import (
    COMPILED,
    KINDS,
    data,
    fit,
    model,
    state,
)

pytestmark = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="since Keras 3.15"
)
for_tables = pytest.mark.parametrize("kind", ["LazyAdam", "RowwiseAdagrad"])
every_compiler = pytest.mark.parametrize("jit_compile", COMPILED)


def both(kind, **of_the_rest):
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            optimizers.FusedAdam(0.01, **of_the_rest), {".*/embeddings": KINDS[kind]()}
        )
    )


@for_tables
@every_compiler
def test_equals_the_optimizer_of_the_tables_alone(kind, jit_compile):
    """Without a table, each is a `FusedAdam`, with the same learning rate here."""
    one, two = model(KINDS[kind](), jit_compile), model(both(kind), jit_compile)
    fit(one)
    fit(two)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@for_tables
@every_compiler
def test_weight_decay_of_the_rest_leaves_tables_alone(kind, jit_compile):
    built = model(both(kind, weight_decay=0.1), jit_compile)
    before = built.get_layer("table").get_weights()[0]
    losses = fit(built)
    assert losses[-1] < losses[0]
    after = built.get_layer("table").get_weights()[0]
    unseen = ~np.isin(np.arange(40), data()[0])
    np.testing.assert_array_equal(after[unseen], before[unseen])
    assert (after[~unseen] != before[~unseen]).any(axis=1).all()


@for_tables
@every_compiler
def test_training_goes_on_from_a_file(kind, jit_compile, tmp_path):
    whole = model(both(kind, weight_decay=0.1), jit_compile)
    fit(whole, 4)
    half = model(both(kind, weight_decay=0.1), jit_compile)
    fit(half, 2)
    half.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    kinds = [type(optimizer) for optimizer in half.optimizer.optimizers]
    assert [type(optimizer) for optimizer in loaded.optimizer.optimizers] == kinds
    assert set(kinds) == {optimizers.FusedAdam, getattr(optimizers, kind)}
    for a, b in zip(state(loaded), state(half), strict=True):
        np.testing.assert_array_equal(a, b)
    fit(loaded, 2)
    for a, b in zip(state(loaded), state(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@for_tables
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(kind, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        built = model(both(kind))
    finally:
        keras.config.set_dtype_policy(before)
    losses = fit(built, 4)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
