"""Auxiliary losses of routers: load balancing, importance, load, z loss, entropy.

Axis letters: n tokens, e experts, k choices per token.

Pure functions of the tensors in a routing record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keras import ops

from keras_moe import _checks
from keras_moe.losses._masked import as_float, bool_mask, masked, mean, number_of_tokens
from keras_moe.routing import Record, expert_counts, gates


def load_balancing_loss(
    router_probs: Any, expert_indices: Any, mask: Any = None
) -> Any:
    """Load balancing loss of the Switch Transformer; 1 for a perfect balance.

    `e * sum_e f_e P_e`, where f_e is the share of the n * k choices that went to
    expert e and P_e the mean probability of e: equations 4 to 6 of Fedus et al. The
    gradient flows through P alone, as f counts choices.

    Unlike in the paper, the loss is not scaled by a weight, and f is a share of all k
    choices of a token, which makes 1 the balanced value for every k.

    Args:
        router_probs: `(n, e)` float, each row sums to 1.
        expert_indices: `(n, k)` int in [0, e).
        mask: `(n,)` bool, False for ignored tokens. All tokens count by default.

    Returns:
        A scalar: 1 if f or P is uniform, e if one expert gets all tokens.

    Raises:
        ValueError: if a shape is wrong, the shapes differ in n, or `expert_indices` are
            not integers.

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
    expert_indices, mask = ops.convert_to_tensor(expert_indices), bool_mask(mask)
    probs = masked(router_probs, mask)
    num_experts, top_k = probs.shape[-1], expert_indices.shape[-1]
    tokens = number_of_tokens(probs, mask)
    choices = expert_counts(expert_indices, num_experts, mask, probs.dtype)
    chosen_share = choices / (tokens * top_k)  # f
    mean_probs = ops.sum(probs, axis=0) / tokens  # P
    return num_experts * ops.sum(chosen_share * mean_probs)


def multi_gate_load_balancing_loss(
    gate_probs: Any, gate_weights: Any, mask: Any = None
) -> Any:
    """Load balancing loss over the union of several gates' choices; 1 if balanced.

    `e * sum_e f_e P_e`. With c_e the number of tokens for which at least one of the t
    gates chose expert e (the expert is computed once for such a token),
    `f_e = c_e / sum_e c_e`; P_e is the mean probability of e over tokens and gates. For
    one gate it is `load_balancing_loss`. The gradient flows through P alone.

    Args:
        gate_probs: `(n, t, e)` float, each gate's softmax over all experts.
        gate_weights: `(n, t, e)` float, 0 where a gate has not chosen an expert.
        mask: `(n,)` bool, False for ignored tokens. All tokens count by default.

    Returns:
        A scalar: 1 if f or P is uniform, e if all gates choose the same single expert
        with probability 1.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ.

    Example:

    >>> probs = np.array([[[0.9, 0.1], [0.2, 0.8]]])
    >>> weights = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> float(keras_moe.losses.multi_gate_load_balancing_loss(probs, weights))
    1.0

    References:
        - [Zhang et al., 2026: SMES: Towards Scalable Multi-Task Recommendation via
          Expert Sparsity](https://arxiv.org/abs/2602.09386), for balance over the
          aggregated choices of all gates
        - [Fedus et al., 2021: Switch Transformers: Scaling to Trillion Parameter Models
          with Simple and Efficient Sparsity](https://arxiv.org/abs/2101.03961)
    """
    _checks.axes(
        gate_probs=(gate_probs, "nte"),
        gate_weights=(gate_weights, "nte"),
        mask=(mask, "n?"),
    )
    mask = bool_mask(mask)
    probs = ops.convert_to_tensor(gate_probs)
    num_gates, num_experts = probs.shape[-2:]
    # NaN counts as chosen, as in `routing.union`.
    chosen = ops.any(ops.convert_to_tensor(gate_weights) != 0, axis=1)  # (n, e)
    probs = masked(ops.sum(probs, axis=1) / num_gates, mask)  # (n, e)
    counts = ops.sum(masked(ops.cast(chosen, probs.dtype), mask), axis=0)  # c
    share = counts / ops.maximum(ops.sum(counts), 1.0)  # f
    mean_probs = ops.sum(probs, axis=0) / number_of_tokens(probs, mask)  # P
    return num_experts * ops.sum(share * mean_probs)


def importance_loss(gate_weights: Any, mask: Any = None) -> Any:
    """CV² of the experts' importance, the sum of an expert's gates over the tokens.

    Equations 6 and 7 of Shazeer et al., without the loss weight. The variance in CV² is
    the population variance.

    Args:
        gate_weights: `(n, e)` float, 0 where an expert was not chosen.
        mask: `(n,)` bool, False for ignored tokens. All tokens count by default.

    Returns:
        A scalar: 0 if all experts are equally important, e - 1 if one has all.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n.

    Example:

    >>> float(keras_moe.losses.importance_loss(np.array([[0.5, 0.5], [1.0, 0.0]])))
    0.25

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538)
    """
    _checks.axes(gate_weights=(gate_weights, "ne"), mask=(mask, "n?"))
    mask = bool_mask(mask)
    return cv_squared(ops.sum(masked(gate_weights, mask), axis=0))


def load_loss(choice_probs: Any, mask: Any = None) -> Any:
    """CV² of the experts' load, a smooth estimate of the tokens per expert.

    Equations 8 to 11 of Shazeer et al. (appendix A), without the loss weight. It needs
    a router with noise, such as `NoisyTopKRouter`.

    Args:
        choice_probs: `(n, e)` float, the probability that a token chooses an expert
            if its noise for that expert is resampled.
        mask: `(n,)` bool, False for ignored tokens. All tokens count by default.

    Returns:
        A scalar: 0 if all experts have the same load, e - 1 if one has all.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n.

    Example:

    >>> float(keras_moe.losses.load_loss(np.array([[0.5, 0.5], [1.0, 0.0]])))
    0.25

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538)
    """
    _checks.axes(choice_probs=(choice_probs, "ne"), mask=(mask, "n?"))
    mask = bool_mask(mask)
    return cv_squared(ops.sum(masked(choice_probs, mask), axis=0))


def router_z_loss(router_logits: Any, mask: Any = None) -> Any:
    """The mean over tokens of `logsumexp(logits)²`, which penalizes large logits.

    Equation 5 of Zoph et al.

    Args:
        router_logits: `(n, e)` float.
        mask: `(n,)` bool, False for ignored tokens. All tokens count by default.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n.

    Example:

    >>> loss = keras_moe.losses.router_z_loss(np.zeros((3, 4)))
    >>> np.isclose(float(loss), np.log(4) ** 2).item()
    True

    References:
        - [Zoph et al., 2022: ST-MoE: Designing Stable and Transferable Sparse Expert
          Models](https://arxiv.org/abs/2202.08906)
    """
    _checks.axes(router_logits=(router_logits, "ne"), mask=(mask, "n?"))
    mask = bool_mask(mask)
    logits = masked(router_logits, mask)
    return mean(ops.square(ops.logsumexp(logits, axis=-1)), mask)


def entropy_loss(router_probs: Any, mask: Any = None) -> Any:
    """The mean entropy, in nats, of a token's distribution over the experts.

    `-sum_e p_e log p_e`, the conditional entropy that Grandvalet and Bengio minimize.
    A positive weight makes the distributions sharper, a negative one flatter.

    Args:
        router_probs: `(n, e)` float, each row sums to 1. Zeros are allowed.
        mask: `(n,)` bool, False for ignored tokens. All tokens count by default.

    Returns:
        A scalar from 0 (one expert has all the probability) to log e (uniform).

    Raises:
        ValueError: if a shape is wrong, or the shapes differ in n.

    Example:

    >>> loss = keras_moe.losses.entropy_loss(np.array([[0.5, 0.5], [1.0, 0.0]]))
    >>> np.isclose(float(loss), np.log(2) / 2).item()
    True

    References:
        - [Grandvalet and Bengio, 2004: Semi-supervised Learning by Entropy
          Minimization](https://papers.nips.cc/paper/2740)
    """
    _checks.axes(router_probs=(router_probs, "ne"), mask=(mask, "n?"))
    mask = bool_mask(mask)
    probs = masked(router_probs, mask)
    return mean(entropy(probs), mask)


def entropy(probs: Any) -> Any:
    """(..., e) -> (...,): the entropy of each distribution, in nats.

    >>> float(keras_moe.losses.entropy(np.array([1.0, 0.0]))) == 0
    True
    """
    _checks.axes(probs=(probs, "...e"))
    probs = as_float(probs)
    # About the smallest normal float32. At p = 0 the entropy is exact, and its
    # gradient, infinite in theory, is large and finite.
    return -ops.sum(probs * ops.log(ops.maximum(probs, 1e-37)), axis=-1)


def auxiliary_losses(routing: Any, weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the weighted auxiliary losses of a routing record.

    Args:
        routing: a record of `keras_moe.routing`, with the fields that the losses need:
            `router_probs`, for "router_z" `router_logits`, for "load" `choice_probs`.
        weights: dict from the name of a loss to its weight. Names: "load_balancing",
            "router_z", "importance", "load", "entropy".

    Returns:
        A dict of one scalar per name, in the order of `weights`.

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
    if not isinstance(routing, Record):
        raise ValueError(
            "`routing` must be a record of keras_moe.routing. "
            f"Received: routing of type {type(routing).__name__}"
        )
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"`weights` must be a dict by loss. Received: weights={weights!r}"
        )
    return {
        name: _checks.finite_number(f"weights[{name!r}]", weight)
        * _RECORD_LOSSES[_checks.one_of("weights", name, _RECORD_LOSSES)](routing)
        for name, weight in weights.items()
    }


def _record_importance_loss(routing: Any) -> Any:
    tokens, num_experts = ops.shape(routing.router_probs)
    return importance_loss(gates(routing, num_experts, tokens), routing.mask)


_RECORD_LOSSES: dict[str, Callable[[Any], Any]] = {
    "load_balancing": lambda r: load_balancing_loss(
        r.router_probs, r.expert_indices, r.mask
    ),
    "router_z": lambda r: router_z_loss(r.router_logits, r.mask),
    "importance": _record_importance_loss,
    "load": lambda r: load_loss(r.choice_probs, r.mask),
    "entropy": lambda r: entropy_loss(r.router_probs, r.mask),
}


def cv_squared(values: Any) -> Any:
    """Return the squared coefficient of variation, `variance / mean²`; 0 for zeros.

    The variance is the population variance. The result does not depend on the scale of
    the values if their mean is well above 1e-9.

    Args:
        values: `(e,)` float.

    Returns:
        A scalar.

    Raises:
        ValueError: if `values` has another rank.

    Example:

    >>> float(keras_moe.losses.cv_squared(np.array([1.0, 3.0])))  # 1 / 2²
    0.25
    """
    _checks.axes(values=(values, "e"))
    values = as_float(values)
    # `ops.mean` would round to float32 on JAX.
    mean = ops.sum(values) / values.shape[0]
    variance = ops.sum(ops.square(values - mean)) / values.shape[0]
    # 1e-18 at least: JAX squares the divisor in the gradient, which must not be 0.
    return variance / (ops.square(mean) + 1e-18)
