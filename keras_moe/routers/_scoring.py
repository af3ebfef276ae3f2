"""Scores: from logits to probabilities, a choice, weights and a record.

Axis letters: n tokens, e experts, k choices a token.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _checks, routing


def checked_score_function(score_function: str) -> str:
    """Return `score_function` if it is a known one, else raise ValueError."""
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(
            "`score_function` must be 'softmax' or 'sigmoid'. "
            f"Received: score_function={score_function!r}"
        )
    return score_function


def checked_renormalize(renormalize: bool | None, top_k: int) -> bool:
    """Return `renormalize`, by default True for more than one choice."""
    if renormalize is None:
        return top_k > 1
    return _checks.flag("renormalize", renormalize)


def softmax(logits: Any) -> Any:
    """Return the softmax over the last axis, which may have one entry."""
    if logits.shape[-1] > 1:
        return ops.softmax(logits, axis=-1)
    # Keras warns of a softmax over one value. This one is 1, and its gradient 0.
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


def finite_or_zero(scores: Any) -> Any:
    """Return scores that can be ordered: the place of NaN differs between sorts."""
    return ops.where(ops.isfinite(scores), scores, ops.zeros_like(scores))


def is_valid(logits: Any, mask: Any) -> Any:
    """Return (n,) bool: the tokens that are not padding and have finite logits."""
    finite = ops.all(ops.isfinite(logits), axis=-1)
    return finite if mask is None else ops.logical_and(finite, mask)


def top_k(scores: Any, k: int) -> Any:
    """(n, e) -> (n, k) int32 in [0, e), also for rows that are not finite."""
    scores = finite_or_zero(ops.stop_gradient(scores))
    return ops.cast(routing.top_k(scores, k), "int32")


def score(logits: Any, score_function: str) -> tuple[Any, Any]:
    """Return the scores (n, e), and the same as probabilities over the experts."""
    if score_function == "softmax":
        probs = softmax(logits)
        return probs, probs
    scores = ops.sigmoid(logits)
    return scores, _shares(scores)


def weigh(
    logits: Any, scores: Any, indices: Any, score_function: str, renormalize: bool
) -> Any:
    """Return the weights (n, k) of the chosen experts."""
    if not renormalize:
        return routing.choose(scores, indices)
    if score_function == "softmax":
        # The shares of chosen softmax scores are a softmax of the chosen logits,
        # which cannot underflow.
        return softmax(routing.choose(logits, indices))
    return _shares(routing.choose(scores, indices))


def record(
    logits: Any, indices: Any, mask: Any, score_function: str, renormalize: bool
) -> routing.Routing:
    """Return the record of the choices `indices` (n, k), weighted by their scores."""
    scores, probs = score(logits, score_function)
    weights = weigh(logits, scores, indices, score_function, renormalize)
    return routing.Routing(indices, weights, logits, probs, mask)


def _shares(scores: Any) -> Any:
    # All sigmoids of a row can underflow to 0; then so are the shares.
    return scores / (ops.sum(scores, axis=-1, keepdims=True) + 1e-20)
