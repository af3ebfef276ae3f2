"""Two tasks of given correlation: hand-worked values and statistical properties."""

import math
from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.task_correlation.data import curve, make_pair, orthonormal_pair
from recsys_examples.task_correlation.settings import Recipe

RECIPE = Recipe(dimension=20, train_rows=15_000, test_rows=5_000)


def label_correlation(pair):
    return np.corrcoef(pair.train.labels.T)[0, 1]


def test_defaults_are_those_of_the_papers():
    # Ma et al.: d = 100, a noise variance of 0.01. Maziarz et al.: c = 1, m = 10.
    recipe = Recipe()
    assert (recipe.dimension, recipe.scale, recipe.sines) == (100, 1.0, 10)
    assert recipe.noise**2 == pytest.approx(0.01)


@pytest.mark.parametrize("dimension", [2, 3, 100])
def test_orthonormal_pair(dimension):
    u_1, u_2 = orthonormal_pair(dimension, np.random.default_rng(3))
    assert u_1.shape == u_2.shape == (dimension,)
    assert u_1 @ u_1 == pytest.approx(1)
    assert u_2 @ u_2 == pytest.approx(1)
    assert u_1 @ u_2 == pytest.approx(0, abs=1e-12)
    others = orthonormal_pair(dimension, np.random.default_rng(4))
    assert not np.allclose(u_1, others[0])


class TestCurve:
    def test_by_hand(self):
        # z + sin(z + 0) + sin(2 z + 1) + sin(3 z + 4)
        expected = 0.5 + math.sin(0.5) + math.sin(2.0) + math.sin(5.5)
        assert curve(np.array([0.5]), sines=3) == pytest.approx([expected])

    def test_without_sines_it_is_the_projection(self):
        projection = np.array([[1.0, -2.0]])
        np.testing.assert_array_equal(curve(projection, sines=0), projection)
        assert curve(projection, sines=0) is not projection


class TestPair:
    @pytest.mark.parametrize("p", [-1.0, -0.3, 0.0, 0.5, 1.0])
    def test_weights(self, p):
        w_1, w_2 = make_pair(p, replace(RECIPE, scale=3.0), 0).weights
        assert np.linalg.norm(w_1) == pytest.approx(3)
        assert np.linalg.norm(w_2) == pytest.approx(3)
        assert w_1 @ w_2 / 9 == pytest.approx(p, abs=1e-12)

    def test_labels_without_noise(self):
        pair = make_pair(0.5, replace(RECIPE, noise=0.0), 0)
        for rows in (pair.train, pair.test):
            expected = curve(rows.inputs @ pair.weights.T, RECIPE.sines)
            np.testing.assert_allclose(rows.labels, expected, atol=1e-5)

    def test_noise(self):
        pair = make_pair(0.5, RECIPE, 0)
        clean = curve(pair.train.inputs @ pair.weights.T, RECIPE.sines)
        noise = pair.train.labels - clean
        # With 15,000 samples, the standard error of the deviation is about 0.6%.
        np.testing.assert_allclose(noise.std(axis=0), 0.1, rtol=0.03)
        assert abs(np.corrcoef(noise.T)[0, 1]) < 0.04

    def test_identical_tasks_differ_only_by_noise(self):
        labels = make_pair(1.0, RECIPE, 0).train.labels
        # Two independent noises: 0.1 sqrt(2).
        assert np.std(labels[:, 0] - labels[:, 1]) == pytest.approx(0.1414, rel=0.03)
        clean = make_pair(1.0, replace(RECIPE, noise=0.0), 0).train.labels
        np.testing.assert_allclose(clean[:, 0], clean[:, 1], atol=1e-5)

    @pytest.mark.parametrize("p", [0.0, 0.5, 0.9])
    def test_linear_labels_have_correlation_p(self, p):
        linear = replace(RECIPE, sines=0, noise=0.0)
        # The standard error is at most 1 / sqrt(15,000) = 0.008.
        assert label_correlation(make_pair(p, linear, 0)) == pytest.approx(p, abs=0.03)

    def test_label_correlation_rises_with_p(self):
        found = [label_correlation(make_pair(p, RECIPE, 0)) for p in (0, 0.5, 0.9, 1)]
        assert found == sorted(found)
        assert abs(found[0]) < 0.03
        assert 0.1 < found[1] < 0.4  # reduced by the sines
        assert found[3] > 0.99

    def test_rows(self):
        pair = make_pair(0.0, RECIPE, 0)
        for rows, count in ((pair.train, 15_000), (pair.test, 5_000)):
            assert rows.inputs.shape == (count, 20)
            assert rows.labels.shape == (count, 2)
            assert rows.inputs.dtype == rows.labels.dtype == np.float32
            assert abs(rows.inputs.mean()) < 0.02
            assert rows.inputs.std() == pytest.approx(1, abs=0.02)
        assert not np.array_equal(pair.train.inputs[:5], pair.test.inputs[:5])

    def test_seed(self):
        first, again = (make_pair(0.5, RECIPE, [0, 1]) for _ in range(2))
        np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
        np.testing.assert_array_equal(first.test.labels, again.test.labels)
        other = make_pair(0.5, RECIPE, [0, 2])
        assert not np.allclose(first.weights, other.weights)
        assert not np.allclose(first.train.inputs, other.train.inputs)

    def test_one_seed_at_two_correlations(self):
        low, high = (make_pair(p, RECIPE, 7) for p in (0.0, 0.9))
        np.testing.assert_array_equal(low.train.inputs, high.train.inputs)
        # The first task is the same, the second differs.
        np.testing.assert_array_equal(low.train.labels[:, 0], high.train.labels[:, 0])
        assert not np.allclose(low.train.labels[:, 1], high.train.labels[:, 1])
