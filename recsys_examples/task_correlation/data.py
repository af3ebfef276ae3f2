"""Two synthetic regression tasks of given correlation.

Axis letters: n rows, d input features, m sines.

With orthonormal u_1, u_2 and a correlation p (Ma et al. 2018, section 3.2):
w_1 = c u_1,  w_2 = c (p u_1 + sqrt(1 - p^2) u_2),
y_k = w_k x + sum over i of sin(a_i w_k x + b_i) + noise,  x standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys_examples.task_correlation.settings import Recipe

TASKS = ("first", "second")


@dataclass(frozen=True)
class Rows:
    """Inputs (n, d) and the labels of both tasks (n, 2), in float32."""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two tasks: weight vectors (2, d), training rows and test rows."""

    weights: np.ndarray
    train: Rows
    test: Rows


def make_pair(correlation: float, recipe: Recipe, seed: int | list[int]) -> Pair:
    """Sample two tasks and their rows.

    Args:
        correlation: p in [-1, 1], the cosine between the two weight vectors.
        recipe: the other settings of the data.
        seed: seed of u_1, u_2, the inputs and the noise. They do not depend on the
            correlation: runs with the same seed can be paired.
    """
    rng = np.random.default_rng(seed)
    u_1, u_2 = orthonormal_pair(recipe.dimension, rng)
    other = correlation * u_1 + np.sqrt(1 - correlation**2) * u_2
    weights = recipe.scale * np.stack([u_1, other])
    rows = recipe.train_rows + recipe.test_rows
    inputs = rng.standard_normal((rows, recipe.dimension), np.float32)
    noise = rng.normal(scale=recipe.noise, size=(rows, 2))
    labels = (curve(inputs @ weights.T, recipe.sines) + noise).astype(np.float32)
    train, test = slice(recipe.train_rows), slice(recipe.train_rows, None)
    return Pair(
        weights,
        Rows(inputs[train], labels[train]),
        Rows(inputs[test], labels[test]),
    )


def orthonormal_pair(
    dimension: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return two random orthonormal vectors."""
    basis, _ = np.linalg.qr(rng.normal(size=(dimension, 2)))
    return basis[:, 0], basis[:, 1]


def curve(projection: np.ndarray, sines: int) -> np.ndarray:
    """Return the label without noise: z + sum over i of sin(i z + (i - 1)^2)."""
    label = projection.copy()
    for i in range(1, sines + 1):
        label += np.sin(i * projection + (i - 1) ** 2)
    return label
