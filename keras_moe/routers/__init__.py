"""Routers: layers that assign experts and combine weights to tokens.

Axis letters: n tokens, d input features, e experts, k choices per token, c capacity
(slots per expert), g groups of experts.

A router maps tokens to one of the records of `keras_moe.routing`, independently of
experts and dispatch. It computes in float32 under any dtype policy (float64 under
float64), because half precision can change the choice between close scores. Gradients
reach a router through weights, probabilities and logits; the choice itself has none.

Tokens outside the mask are not routed, and their rows in a record are undefined. NaN
and infinite features of a token affect only its own row.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from keras_moe import _checks
from keras_moe.routers._base import Router
from keras_moe.routers._bias_balanced import BiasBalancedRouter
from keras_moe.routers._dense import DenseRouter
from keras_moe.routers._expert_choice import ExpertChoiceRouter
from keras_moe.routers._hash import HashRouter
from keras_moe.routers._hierarchical import HierarchicalRouter
from keras_moe.routers._noisy_top_k import NoisyTopKRouter
from keras_moe.routers._sinkhorn import SinkhornRouter
from keras_moe.routers._top_k import TopKRouter

__all__ = [
    "KNOWN",
    "BiasBalancedRouter",
    "DenseRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "HierarchicalRouter",
    "NoisyTopKRouter",
    "Router",
    "SinkhornRouter",
    "TopKRouter",
    "get",
]

# Names for `MoE(router=)` and `get`. HierarchicalRouter has no `num_experts` argument.
KNOWN: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "bias_balanced": BiasBalancedRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "sinkhorn": SinkhornRouter,
    "dense": DenseRouter,
}


def get(identifier: Any, **defaults: Any) -> Any:
    """Return the router specified by `identifier`.

    Args:
        identifier: a name in `keras_moe.routers.KNOWN`, a router class, a config from
            `keras.saving.serialize_keras_object`, or a router, which is returned
            unchanged.
        **defaults: arguments for a router created from a name or a class, such as
            `num_experts` and `top_k`. Arguments that only other routers of `KNOWN` have
            (`top_k` for "dense", `seed` for "sinkhorn") are ignored: the same defaults
            work for every name.

    Returns:
        A router.

    Raises:
        ValueError: if `identifier` is none of these, or an argument of the router is
            invalid.

    Example:

    >>> router = keras_moe.routers.get("top_k", num_experts=4, top_k=1)
    >>> type(router).__name__, router.top_k
    ('TopKRouter', 1)
    >>> config = keras.saving.serialize_keras_object(router)
    >>> keras_moe.routers.get(config).top_k
    1
    """
    if isinstance(identifier, dict):
        found = _checks.deserialized("identifier", identifier)
    elif isinstance(identifier, str):
        found = KNOWN.get(identifier)
    else:
        found = identifier
    if inspect.isclass(found) and hasattr(found, "choice"):
        found = found(**_arguments_of(found, defaults))
    if not isinstance(found, keras.layers.Layer) or not hasattr(found, "choice"):
        raise ValueError(
            f"`identifier` must be one of {list(KNOWN)}, or a router, its class or its "
            f"config. Received: identifier={identifier!r}"
        )
    return found


def _arguments_of(kind: type, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return `defaults` without the arguments that only other routers have."""
    own = inspect.signature(kind).parameters
    every = {name for k in KNOWN.values() for name in inspect.signature(k).parameters}
    return {
        name: value
        for name, value in defaults.items()
        if name in own or name not in every
    }
