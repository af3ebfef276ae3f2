"""Auxiliary losses: what a router is asked for besides the task.

Axis letters: n tokens, e experts, k choices a token.

Pure functions of the tensors in a routing record. Each returns a scalar, computed in
float32 (float64 for float64 tensors). Tokens outside the mask count nowhere, not even
with a NaN in their row; where no token is left, a loss is 0. A mask may also be made of
numbers, of which 0 is False and every other one True.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keras import backend, ops

from keras_moe import _checks
from keras_moe.routing import expert_counts, gates


def load_balancing_loss(
    router_probs: Any, expert_indices: Any, mask: Any = None
) -> Any:
    """How unevenly tokens and probability fall on the experts; 1 in perfect balance.

    `e * sum_e f_e P_e`, where f_e is the share of the n * k choices that went to
    expert e and P_e the mean probability of e: equations 4 to 6 of Fedus et al. The
    gradient flows through P alone, as f counts choices.

    Unlike in the paper, the weight of the loss is left to the caller, and f is a share
    of all k choices of a token, so that 1 means balance for every k.

    Args:
        router_probs: `(n, e)` float, each row sums to 1.
        expert_indices: `(n, k)` int in [0, e).
        mask: `(n,)` bool, False for tokens that do not count. All count by default.

    Returns:
        A scalar: 1 if either f or P is uniform, e if one expert gets everything.

    Raises:
        ValueError: if a shape is another one, if the shapes do not agree in n, or if
            `expert_indices` are no integers.

    Example:

    >>> probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    >>> float(keras_moe.losses.load_balancing_loss(probs, np.array([[0], [1]])))
    1.0

    References:
        - [Fedus et al., 2021: Switch Transformers: Scaling to Trillion Parameter Models
          with Simple and Efficient Sparsity](https://arxiv.org/abs/2101.03961)
    """
    _checks.axes(
        router_probs=(router_probs, "ne"),
        expert_indices=(expert_indices, "nk"),
        mask=(mask, "n?"),
    )
    _checks.integers(expert_indices=expert_indices)
    expert_indices, mask = ops.convert_to_tensor(expert_indices), _flags(mask)
    probs = _counted(router_probs, mask)
    num_experts, top_k = probs.shape[-1], expert_indices.shape[-1]
    tokens = _number_of_tokens(probs, mask)
    choices = expert_counts(expert_indices, num_experts, mask, probs.dtype)
    chosen_share = choices / (tokens * top_k)  # f
    mean_probs = ops.sum(probs, axis=0) / tokens  # P
    return num_experts * ops.sum(chosen_share * mean_probs)


def importance_loss(gate_weights: Any, mask: Any = None) -> Any:
    """CV² of the experts' importance, the sum of an expert's gate over the tokens.

    Equations 6 and 7 of Shazeer et al., without the weight of the loss. The variance
    in CV² is that of the population.

    Args:
        gate_weights: `(n, e)` float, 0 where an expert was not chosen.
        mask: `(n,)` bool, False for tokens that do not count. All count by default.

    Returns:
        A scalar: 0 if all experts are equally important, e - 1 if one has all.

    Raises:
        ValueError: if a shape is another one, or if the shapes do not agree in n.

    Example:

    >>> float(keras_moe.losses.importance_loss(np.array([[0.5, 0.5], [1.0, 0.0]])))
    0.25

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538)
    """
    _checks.axes(gate_weights=(gate_weights, "ne"), mask=(mask, "n?"))
    mask = _flags(mask)
    return cv_squared(ops.sum(_counted(gate_weights, mask), axis=0))


def load_loss(choice_probs: Any, mask: Any = None) -> Any:
    """CV² of the experts' load, a smooth estimate of the tokens an expert gets.

    Equations 8 to 11 of Shazeer et al. (appendix A), without the weight of the loss.
    Only a router with noise has a load of this kind.

    Args:
        choice_probs: `(n, e)` float, the probability that a token chooses an expert
            if its noise for that expert is drawn anew.
        mask: `(n,)` bool, False for tokens that do not count. All count by default.

    Returns:
        A scalar: 0 if all experts have the same load, e - 1 if one has all.

    Raises:
        ValueError: if a shape is another one, or if the shapes do not agree in n.

    Example:

    >>> float(keras_moe.losses.load_loss(np.array([[0.5, 0.5], [1.0, 0.0]])))
    0.25

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538)
    """
    _checks.axes(choice_probs=(choice_probs, "ne"), mask=(mask, "n?"))
    mask = _flags(mask)
    return cv_squared(ops.sum(_counted(choice_probs, mask), axis=0))


def router_z_loss(router_logits: Any, mask: Any = None) -> Any:
    """The mean over tokens of `logsumexp(logits)²`, which keeps logits small.

    Equation 5 of Zoph et al.

    Args:
        router_logits: `(n, e)` float.
        mask: `(n,)` bool, False for tokens that do not count. All count by default.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: if a shape is another one, or if the shapes do not agree in n.

    Example:

    >>> loss = keras_moe.losses.router_z_loss(np.zeros((3, 4)))
    >>> np.isclose(float(loss), np.log(4) ** 2).item()
    True

    References:
        - [Zoph et al., 2022: ST-MoE: Designing Stable and Transferable Sparse Expert
          Models](https://arxiv.org/abs/2202.08906)
    """
    _checks.axes(router_logits=(router_logits, "ne"), mask=(mask, "n?"))
    mask = _flags(mask)
    logits = _counted(router_logits, mask)
    return _mean(ops.square(ops.logsumexp(logits, axis=-1)), mask)


def entropy_loss(router_probs: Any, mask: Any = None) -> Any:
    """The mean entropy, in nats, of a token's distribution over the experts.

    `-sum_e p_e log p_e`, the conditional entropy that Grandvalet and Bengio minimise.
    With a positive weight the router becomes confident, with a negative one undecided.

    Args:
        router_probs: `(n, e)` float, each row sums to 1. Zeros are allowed.
        mask: `(n,)` bool, False for tokens that do not count. All count by default.

    Returns:
        A scalar from 0 (one expert has all the probability) to log e (uniform).

    Raises:
        ValueError: if a shape is another one, or if the shapes do not agree in n.

    Example:

    >>> loss = keras_moe.losses.entropy_loss(np.array([[0.5, 0.5], [1.0, 0.0]]))
    >>> np.isclose(float(loss), np.log(2) / 2).item()
    True

    References:
        - [Grandvalet and Bengio, 2004: Semi-supervised Learning by Entropy
          Minimization](https://papers.nips.cc/paper/2740)
    """
    _checks.axes(router_probs=(router_probs, "ne"), mask=(mask, "n?"))
    mask = _flags(mask)
    probs = _counted(router_probs, mask)
    # The smallest number that is normal in float32, about: at p = 0 the entropy is
    # right and its slope, in truth infinite, is large and finite.
    logs = ops.log(ops.maximum(probs, 1e-37))
    return _mean(-ops.sum(probs * logs, axis=-1), mask)


def auxiliary_losses(routing: Any, weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the losses of a routing record that have a weight, each times its weight.

    Args:
        routing: a record of `keras_moe.routing`, with the fields that the losses need:
            `router_probs`, for "router_z" `router_logits`, for "load" `choice_probs`.
        weights: weight by name of the loss, names out of "load_balancing", "router_z",
            "importance", "load" and "entropy".

    Returns:
        A dict of one scalar a name, in the order of `weights`.

    Raises:
        ValueError: if a name is unknown.

    Example:

    >>> record = keras_moe.routing.Routing(
    ...     expert_indices=np.array([[0], [1]]),
    ...     combine_weights=np.array([[1.0], [1.0]]),
    ...     router_probs=np.array([[0.9, 0.1], [0.2, 0.8]]),
    ... )
    >>> weighted = keras_moe.losses.auxiliary_losses(record, {"load_balancing": 0.5})
    >>> {name: float(loss) for name, loss in weighted.items()}
    {'load_balancing': 0.5}
    """
    return {
        name: weight * _OF_RECORD[_checks.one_of("weights", name, _OF_RECORD)](routing)
        for name, weight in weights.items()
    }


def _importance_of(routing: Any) -> Any:
    tokens, num_experts = ops.shape(routing.router_probs)
    return importance_loss(gates(routing, num_experts, tokens), routing.mask)


_OF_RECORD: dict[str, Callable[[Any], Any]] = {
    "load_balancing": lambda r: load_balancing_loss(
        r.router_probs, r.expert_indices, r.mask
    ),
    "router_z": lambda r: router_z_loss(r.router_logits, r.mask),
    "importance": _importance_of,
    "load": lambda r: load_loss(r.choice_probs, r.mask),
    "entropy": lambda r: entropy_loss(r.router_probs, r.mask),
}


def cv_squared(values: Any) -> Any:
    """Return the squared coefficient of variation, `variance / mean²`; 0 for zeros.

    The variance is that of the population. The scale of the values does not matter,
    as long as their mean is well above 1e-9.

    Args:
        values: `(e,)` float.

    Returns:
        A scalar.

    Raises:
        ValueError: if the shape is another one.

    Example:

    >>> float(keras_moe.losses.cv_squared(np.array([1.0, 3.0])))  # 1 / 2²
    0.25
    """
    _checks.axes(values=(values, "e"))
    values = _as_float(values)
    # Not `ops.mean`, which Keras rounds to float32 on JAX.
    mean = ops.sum(values) / values.shape[0]
    variance = ops.sum(ops.square(values - mean)) / values.shape[0]
    # Not smaller: JAX squares the divisor in the gradient, and that must not be 0.
    return variance / (ops.square(mean) + 1e-18)


def _as_float(values: Any) -> Any:
    values = ops.convert_to_tensor(values)
    wide = backend.standardize_dtype(values.dtype) == "float64"
    return ops.cast(values, "float64" if wide else "float32")


def _flags(mask: Any) -> Any:
    return None if mask is None else ops.cast(mask, "bool")


def _counted(values: Any, mask: Any) -> Any:
    """Return `values` with zeros in the rows that do not count.

    A product with the mask would let the NaN of a padded row through.
    """
    values = _as_float(values)
    if mask is None:
        return values
    return ops.where(ops.expand_dims(mask, -1), values, ops.zeros_like(values))


def _number_of_tokens(values: Any, mask: Any) -> Any:
    """Return how many tokens count, as a divisor: 1 where none does."""
    if mask is None:
        count = ops.cast(ops.shape(values)[0], values.dtype)
    else:
        count = ops.sum(ops.cast(mask, values.dtype))
    return ops.maximum(count, 1.0)


def _mean(values: Any, mask: Any) -> Any:
    """(n,) -> the mean over the tokens that count."""
    tokens = _number_of_tokens(values, mask)
    if mask is not None:
        values = ops.where(mask, values, ops.zeros_like(values))
    return ops.sum(values) / tokens
