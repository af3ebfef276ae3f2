"""Scoring: logits to scores, choices, combine weights and a record.

Axis letters: n tokens, e experts, k choices per token.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _checks, routing


def checked_score_function(score_function: str) -> str:
    """Return `score_function` if it is supported, else raise ValueError."""
    return _checks.one_of("score_function", score_function, ("softmax", "sigmoid"))


def checked_renormalize(renormalize: bool | None, top_k: int) -> bool:
    """Return `renormalize`, which defaults to `top_k > 1`."""
    if renormalize is None:
        return top_k > 1
    return _checks.flag("renormalize", renormalize)


def softmax(logits: Any) -> Any:
    """Return the softmax over the last axis, which may have size 1."""
    if logits.shape[-1] > 1:
        return ops.softmax(logits, axis=-1)
    # Avoids Keras' warning for a softmax over one value. The gradient is 0.
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


def finite_or_zero(scores: Any) -> Any:
    """Return scores with 0 for NaN and infinity: the sort order of NaN varies."""
    return ops.where(ops.isfinite(scores), scores, ops.zeros_like(scores))


def is_valid(logits: Any, mask: Any) -> Any:
    """Return (n,) bool: the tokens that are not padding and have finite logits."""
    finite = ops.all(ops.isfinite(logits), axis=-1)
    return finite if mask is None else ops.logical_and(finite, mask)


def top_k(scores: Any, k: int) -> Any:
    """(n, e) -> (n, k) int32 in [0, e), also for rows with NaN or infinity."""
    scores = finite_or_zero(ops.stop_gradient(scores))
    return ops.cast(routing.top_k(scores, k), "int32")


def score(logits: Any, score_function: str) -> tuple[Any, Any]:
    """Return the scores (n, e), and the scores normalized to probabilities."""
    if score_function == "softmax":
        probs = softmax(logits)
        return probs, probs
    scores = ops.sigmoid(logits)
    return scores, _normalized(scores)


def combine_weights(
    logits: Any, scores: Any, indices: Any, score_function: str, renormalize: bool
) -> Any:
    """Return the weights (n, k) of the chosen experts."""
    if not renormalize:
        return routing.choose(scores, indices)
    if score_function == "softmax":
        # Renormalized softmax scores are the softmax of the chosen logits, which
        # cannot underflow.
        return softmax(routing.choose(logits, indices))
    return _normalized(routing.choose(scores, indices))


def record(
    logits: Any, indices: Any, mask: Any, score_function: str, renormalize: bool
) -> routing.Routing:
    """Return the record of the choices `indices` (n, k), with scores as weights."""
    scores, probs = score(logits, score_function)
    weights = combine_weights(logits, scores, indices, score_function, renormalize)
    return routing.Routing(indices, weights, logits, probs, mask)


def _normalized(scores: Any) -> Any:
    # If all sigmoids of a row underflow to 0, the result is 0.
    return scores / (ops.sum(scores, axis=-1, keepdims=True) + 1e-20)
