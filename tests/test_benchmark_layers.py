"""The work of the benchmarks of sparse layers, and the fit of a power law."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.benchmarks import layer_work, power_law

SIZES = layer_work.LayerSizes(rows=512, experts=8, features=16, hidden=32)


def test_flops_of_an_mlp():
    # A row and an expert: two matmuls of 16 * 32 products and sums, thrice a step.
    assert SIZES.flops("MLP") == 512 * 2 * (2 * 2 * 16 * 32) * 3
    assert SIZES.flops("GLU") == SIZES.flops("MLP") * 3 // 2


def _counts(routing):
    x, kernel = layer_work.draw_rows(SIZES, routing)
    chosen = np.argsort(-(x @ kernel), axis=1)[:, :2]
    return np.bincount(chosen.ravel(), minlength=8)


def test_all_rows_choose_the_same_experts():
    np.testing.assert_array_equal(_counts("all on one"), [512, 512, 0, 0, 0, 0, 0, 0])


def test_rows_choose_uniformly_or_by_zipfs_law():
    # 1024 choices; uniform: 128 an expert, with a standard deviation of 10.
    assert abs(_counts("uniform") - 128).max() < 50
    zipf = _counts("Zipf")
    assert zipf[0] > 2.5 * zipf[7]
    assert zipf[0] < 512


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the einsums are in TensorFlow"
)
@pytest.mark.parametrize("routing", ["uniform", "Zipf"])
def test_einsums_and_moe_have_equal_outputs(routing, monkeypatch):
    from tests.benchmarks.ours import sparse_layers
    from tests.benchmarks.peers import einsum_switch

    monkeypatch.setattr(einsum_switch, "CAPACITY_FACTOR", 4.0)  # Drops no choice.
    sizes = {"rows": 512, "experts": 8, "features": 16, "hidden": 32}
    ours = sparse_layers.make("MLP", sizes, routing).describe()
    theirs = einsum_switch.make(sizes, routing).describe()
    assert theirs["output_rms"] == pytest.approx(ours["output_rms"], rel=1e-6)
    assert theirs["parameters"] == ours["parameters"]


def test_power_law_by_hand():
    # x = log 1, log e, log e^2 = 0, 1, 2 and y = 0, 1, 3: the slope is
    # ((-1) 0 + 0 + 1 * 3) / 2 = 1.5; the residuals are 1/6, -1/3, 1/6, their squares
    # sum to 1/6, and sqrt((1/6) / 1 / 2) = 0.2887.
    e = np.e
    found = power_law.fit({1.0: 1.0, e: e, e**2: e**3})
    assert found.exponent == pytest.approx(1.5)
    assert found.standard_error == pytest.approx(np.sqrt(1 / 12))


def test_power_law_needs_three_sizes():
    with pytest.raises(ValueError, match="at least 3 sizes; got 2"):
        power_law.fit({1: 1.0, 2: 2.0})
