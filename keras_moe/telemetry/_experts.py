"""How alike the experts of a mixture are, and how many of their units are silent.

Axis letters: n rows, d input features, u output units, h hidden units, e experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_moe.experts import LayerExperts
from keras_moe.experts._protocol import apply_prologue
from keras_moe.experts._stacked import StackedDense


def output_similarity(experts: Any, rows: Any) -> np.ndarray:
    """Return the correlation of the outputs of two experts, `(e, e)` in [-1, 1].

    The mean of every unit over the rows is subtracted first. An expert with constant
    outputs correlates with none (0), also not with itself.

    Args:
        experts: a layer of `keras_moe.experts`, called on every row.
        rows: tensor of shape `(n, d)`.
    """
    return similarity_of(outputs_and_zeros(experts, rows)[0])


def kernel_similarity(experts: Any) -> np.ndarray | None:
    """Return the cosine of the kernels of two experts, `(e, e)`.

    None for experts of different shapes. Random kernels have cosines near 0; copies
    have 1.
    """
    if isinstance(experts, LayerExperts):
        kernels = [
            [array(w).ravel() for w in layer.weights if len(w.shape) > 1]
            for layer in experts.layers
        ]
        flat = [np.concatenate(own) if own else np.zeros(0) for own in kernels]
        sizes = {part.size for part in flat}
        return _cosines([np.stack(flat)]) if len(sizes) == 1 and sizes != {0} else None
    e = getattr(experts, "num_experts", None)
    stacked = [
        array(w).reshape(e, -1)
        for w in experts.weights
        if len(w.shape) > 2 and w.shape[0] == e
    ]
    return _cosines(stacked) if stacked else None


def zero_activations(experts: Any, rows: Any) -> np.ndarray | None:
    """Return the share of zeros among the hidden activations of an expert, `(e,)`.

    About 0.5 for ReLU at the start; 1 for an expert whose hidden units are all silent
    on all rows, which no gradient can change ("dead ReLUs"). None for experts without
    hidden layers, or that are no MLPs or gated units.

    Args:
        experts: a layer of `keras_moe.experts`.
        rows: tensor of shape `(n, d)`.
    """
    return outputs_and_zeros(experts, rows)[1]


def outputs_and_zeros(experts: Any, rows: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the outputs `(e, n, u)`, and `zero_activations`, from one pass."""
    if not isinstance(experts, StackedDense):
        return array(experts(rows)).swapaxes(0, 1), None
    zeros: list[np.ndarray] = []

    def matmul(rows: Any, kernel: Any, bias: Any = None, prologue: Any = None) -> Any:
        rows = apply_prologue(prologue, rows)
        if prologue is not None:
            zeros.append((array(rows) == 0.0).mean(axis=(1, 2)))
        rows = ops.matmul(rows, kernel)
        return rows if bias is None else rows + ops.expand_dims(bias, 1)

    rows = ops.cast(rows, experts.compute_dtype)
    slots = ops.repeat(ops.expand_dims(rows, 0), experts.num_experts, axis=0)
    outputs = array(experts.on_rows(slots, matmul))
    return outputs, np.mean(zeros, axis=0) if zeros else None


def similarity_of(outputs: np.ndarray) -> np.ndarray:
    """`output_similarity` of outputs `(e, n, u)`."""
    centred = outputs - outputs.mean(axis=1, keepdims=True)
    return _cosines([centred.reshape(len(outputs), -1)])


def _cosines(parts: list[np.ndarray]) -> np.ndarray:
    """Cosines of e vectors in parts (e, m), as (e, e); 0 for a vector of zeros."""
    # The products are normalized, not the vectors: that copies large kernels twice.
    with np.errstate(over="ignore", invalid="ignore"):  # NaN, of a diverged expert.
        products = np.sum([part @ part.T for part in parts], axis=0, dtype="float64")
        lengths = np.sqrt(np.diag(products))
        lengths = np.where(lengths > 0, lengths, 1.0)
        return np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)


def array(tensor: Any) -> np.ndarray:
    """Return a tensor in float32."""
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))
