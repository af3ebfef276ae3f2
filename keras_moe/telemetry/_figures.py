"""Figures of a mixture: load, balance, sharpness of gates, likeness of experts.

Axis letters: n rows, g gates, e experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_moe.telemetry._experts import (
    kernel_similarity,
    outputs_and_zeros,
    similarity_of,
)
from keras_moe.telemetry._mixtures import Mixture

_ROWS_OF_EXPERTS = 256


def summarise(mixture: Mixture) -> dict[str, Any]:
    """Return the figures of a mixture, as plain numbers and arrays.

    Args:
        mixture: of `observe`.

    Returns:
        A dict with

        - `"load"`: `(e,)`, the share of each expert in the choices or the weight of all
          gates.
        - `"load_cv"`: float, standard deviation of the loads over their mean: 0 for
          equal loads, `sqrt(e - 1)` if one expert has all. NaN if gates cannot choose
          the same experts (`PLE`), whose loads differ by design.
        - `"usage"`: `(g, e)`, the same share by gate.
        - `"relative_usage"`: `(e,)`, the largest share of an expert in any gate, times
          the number of experts of that gate: 1 if even, 0 for an expert without use.
        - `"largest_weight"`: `(g,)`, the mean over rows of the largest weight.
        - `"entropy"`: `(g,)`, the mean entropy of a row's weights (of a router: of its
          probabilities) over that of equal weights: 0 sharp, 1 even. NaN for a router
          without probabilities.
        - `"gate_distance"`: float, the mean over rows of the largest total variation
          distance between two gates: 0 if all tasks have the same weights. None for one
          gate.
        - `"dropped"`: float, the share of a router's choices without a slot.
        - `"output_similarity"`, `"kernel_similarity"`: `(e, e)`, see
          `keras_moe.telemetry`; None if they do not exist.
        - `"zero_activations"`: `(e,)`, the share of zeros in hidden units; or None.
        - `"rows"`: int, n.
        - `"readable"`: bool `(g, e)`, whether a gate can choose the expert.
        - `"finite_rows"`: float, the share of rows whose weights are finite. Rows of
          other weights are in no other figure.

        Similarities and zeros are of the first 256 rows.

    Example:

    >>> inputs = keras.Input((4,))
    >>> outputs = keras_moe.layers.MoE(num_experts=3, expert_units=(8, 2))(inputs)
    >>> model = keras.Model(inputs, outputs)
    >>> mixture, = keras_moe.telemetry.observe(model, np.ones((8, 4), "float32"))
    >>> figures = keras_moe.telemetry.summarise(mixture)
    >>> float(figures["load"].sum()), figures["kernel_similarity"].shape
    (1.0, (3, 3))
    """
    finite = np.isfinite(mixture.weights).all(axis=(1, 2))
    share = float(finite.mean()) if len(finite) else 0.0
    rows = len(mixture.weights)
    if finite.any():
        mixture = mixture._replace(weights=mixture.weights[finite])
    usage, readable = mixture.usage, mixture.readable
    sizes = readable.sum(axis=1, keepdims=True)
    load = usage.sum(axis=0) / max(float(usage.sum()), 1e-12)
    figures: dict[str, Any] = {
        "load": load,
        "load_cv": float(np.std(load) / max(load.mean(), 1e-12)),
        "usage": usage,
        "relative_usage": (usage * sizes).max(axis=0),
        "largest_weight": mixture.weights.max(axis=-1).mean(axis=0),
        "entropy": _entropy(mixture),
        "gate_distance": _gate_distance(mixture.weights),
        "dropped": float(mixture.routing.get("dropped_fraction", 0.0)),
        "output_similarity": None,
        "kernel_similarity": None,
        "zero_activations": None,
        "rows": rows,
        "readable": readable,
        "finite_rows": share,
    }
    if not readable.all():
        figures["load_cv"] = float("nan")
    if mixture.experts is not None:
        figures["kernel_similarity"] = kernel_similarity(mixture.experts)
    if mixture.experts is not None and mixture.rows is not None:
        first = mixture.rows[:_ROWS_OF_EXPERTS]
        outputs, zeros = outputs_and_zeros(mixture.experts, first)
        figures["output_similarity"] = similarity_of(outputs)
        figures["zero_activations"] = zeros
    return figures


def _entropy(mixture: Mixture) -> np.ndarray:
    sizes = mixture.readable.sum(axis=1)
    if mixture.routing:
        entropy = np.array([mixture.routing.get("router_entropy", np.nan)])
    else:
        w = mixture.weights / np.maximum(mixture.weights.sum(-1, keepdims=True), 1e-12)
        entropy = -(w * np.log(np.maximum(w, 1e-12))).sum(axis=-1).mean(axis=0)
    return np.where(sizes > 1, entropy / np.log(np.maximum(sizes, 2)), np.nan)


def _gate_distance(weights: np.ndarray) -> float | None:
    g = weights.shape[1]
    if g < 2:
        return None
    largest = np.zeros(len(weights))
    for first in range(g):
        for second in range(first):
            apart = np.abs(weights[:, first] - weights[:, second]).sum(axis=-1) / 2
            largest = np.maximum(largest, apart)
    return float(largest.mean())
