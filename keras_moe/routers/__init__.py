"""Routers: layers that give each token its experts, and their weights.

Axis letters: n tokens, d input features, e experts, k choices a token, c capacity
(slots an expert), g groups of experts.

A router maps tokens to one of the records of `keras_moe.routing`, and depends on
neither experts nor dispatch. It computes in float32 under any dtype policy (float64
under float64), because half precision would change the choice between near scores.
Gradients reach a router through weights, probabilities and logits, never through the
choice itself.

Tokens outside the mask are not routed, and their rows in a record have no meaning. NaN
and infinite features of a token change only its own row.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

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

# What `MoE(router=)` and `get` take. HierarchicalRouter has no `num_experts`.
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
    """Return the router that `identifier` stands for.

    Args:
        identifier: a name out of `keras_moe.routers.KNOWN`, the class of a router, its
            config as `keras.saving.serialize_keras_object` returns it, or a router,
            which is returned as it is.
        **defaults: arguments for a router that is made from a name or a class, such as
            `num_experts` and `top_k`. An argument that only other routers of `KNOWN`
            have (`top_k` for "dense", `seed` for "sinkhorn") is left out, so that the
            same defaults serve every name.

    Returns:
        A router.

    Raises:
        ValueError: if `identifier` is none of these, or an argument of the router
            breaks its rule.

    Example:

    >>> router = keras_moe.routers.get("top_k", num_experts=4, top_k=1)
    >>> type(router).__name__, router.top_k
    ('TopKRouter', 1)
    >>> config = keras.saving.serialize_keras_object(router)
    >>> keras_moe.routers.get(config).top_k
    1
    """
    if isinstance(identifier, dict):
        found = keras.saving.deserialize_keras_object(identifier)
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
    """Return `defaults` without those that only other known routers have."""
    own = inspect.signature(kind).parameters
    every = {name for k in KNOWN.values() for name in inspect.signature(k).parameters}
    return {
        name: value
        for name, value in defaults.items()
        if name in own or name not in every
    }
