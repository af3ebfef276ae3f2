"""The work of sparse layers: sizes, rows, and weights, equal in every library.

Axis letters: n rows, d input and output features, e experts, h hidden units, k experts
of a row.

Every router is a linear map without bias. Its kernel is the identity on the first e
features, in which the rows hold the wanted logits; so all libraries choose the same
experts, with their routers at full cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUTINGS = ("uniform", "Zipf", "all on one")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer.

    Attributes:
        rows: n.
        experts: e, at most `features`.
        features: d.
        hidden: h of an expert.
        top_k: k.
    """

    rows: int
    experts: int
    features: int = 256
    hidden: int = 512
    top_k: int = 2

    def flops(self, kind: str) -> int:
        """Return the operations of the experts in a forward and backward pass.

        Args:
            kind: "MLP" (two matmuls) or "GLU" (three).
        """
        matmuls = {"MLP": 2, "GLU": 3}[kind]
        forward = 2 * self.rows * self.top_k * self.features * self.hidden * matmuls
        return 3 * forward


def draw_rows(sizes: LayerSizes, routing: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of shape (n, d) and the router's kernel of shape (d, e).

    Args:
        sizes: the sizes.
        routing: how often experts are chosen: "uniform"; "Zipf", expert i with a weight
            of 1 / i; "all on one", every row to the first k.
    """
    rng = np.random.default_rng(0)
    n, d, e = sizes.rows, sizes.features, sizes.experts
    log_weights = {
        "uniform": np.zeros(e),
        "Zipf": -np.log(np.arange(1, e + 1)),
        "all on one": 20.0 * np.clip(sizes.top_k - np.arange(e), 0, None),
    }[routing]
    x = rng.normal(size=(n, d))
    # The k largest of log p + Gumbel noise are k draws without replacement from p.
    x[:, :e] = log_weights + rng.gumbel(size=(n, e))
    return x.astype("float32"), np.eye(d, e, dtype="float32")


def draw_experts(sizes: LayerSizes, kind: str) -> dict[str, np.ndarray]:
    """Return the kernels of all experts.

    Returns:
        For "GLU": "gate" and "up" of shape (e, d, h), and "down" of shape (e, h, d).
        For "MLP": "up" and "down".
    """
    rng = np.random.default_rng(1)
    e, d, h = sizes.experts, sizes.features, sizes.hidden
    shapes = {"gate": (e, d, h), "up": (e, d, h), "down": (e, h, d)}
    if kind == "MLP":
        del shapes["gate"]
    return {name: _glorot(rng, shape) for name, shape in shapes.items()}


def facts(sizes: LayerSizes, kind: str, outputs: Any, note: str = "") -> dict[str, Any]:
    """Return what is reported about a layer.

    Args:
        sizes: the sizes.
        kind: "MLP" or "GLU".
        outputs: the outputs, of any shape, as an array. Their root mean square shows
            that libraries compute the same.
        note: how the layer differs from the others.
    """
    found: dict[str, Any] = {"flops": sizes.flops(kind)}
    found["output_rms"] = float(np.sqrt(np.mean(np.square(outputs, dtype="float64"))))
    return {**found, "note": note} if note else found


def sizes_of(arguments: Mapping[str, int]) -> LayerSizes:
    """Return sizes from the arguments of a case."""
    return LayerSizes(**arguments)


def _glorot(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    limit = np.sqrt(6 / (shape[-2] + shape[-1])).astype("float32")
    return limit * (2 * rng.random(shape, dtype="float32") - 1)
