"""Builds and validates the router, shared experts, losses and metrics of a `MoE`.

Pure functions of the arguments of `MoE`. Any router works with any dispatch that
supports its kind of choice; invalid combinations raise ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_moe import _checks, routers
from keras_moe import dispatch as dispatch_lib
from keras_moe._layer import Layer
from keras_moe.initializers import independent
from keras_moe.metrics import RoutingMetrics


def make_router(
    router: Any,
    num_experts: int,
    top_k: int | None,
    capacity_factor: float | None,
    seed: int | None,
    dtype: Any,
) -> keras.layers.Layer:
    """Return the given router after checks, or a new one made from its name."""
    router = "top_k" if router is None else router
    if isinstance(router, keras.layers.Layer):
        _check_router(router, num_experts, top_k)
        return router
    kind = routers.KNOWN[_checks.one_of("router", router, routers.KNOWN)]
    if kind.choice == "all" and top_k not in (None, num_experts):
        raise ValueError(
            f"`top_k` must be None for the router {router!r}, which sends every "
            f"token to all experts. Received: top_k={top_k}"
        )
    arguments: dict[str, Any] = {"top_k": top_k or min(2, num_experts)}
    if seed is not None:
        # The experts' dropout uses `seed` itself.
        arguments["seed"] = seed + 1
    if capacity_factor is not None:
        arguments["capacity_factor"] = capacity_factor  # Expert choice only.
    return routers.get(
        router, num_experts=num_experts, **arguments, dtype=dtype, name="router"
    )


def _check_router(router: Any, num_experts: int, top_k: int | None) -> None:
    if getattr(router, "choice", None) not in dispatch_lib.SERVED:
        raise ValueError(
            "`router` must be a layer of keras_moe.routers, or have an attribute "
            f"`choice` that is one of {list(dispatch_lib.SERVED)}. "
            f"Received: router={router!r}"
        )
    if getattr(router, "num_experts", None) != num_experts:
        raise ValueError(
            "`router` must route to `num_experts` experts. Received: "
            f"num_experts={num_experts}, router={router!r} with "
            f"num_experts={getattr(router, 'num_experts', None)}"
        )
    # A router of another package may have no top_k if it has no choice.
    own = num_experts if router.choice == "all" else router.top_k
    if top_k not in (None, own):
        raise ValueError(
            "`top_k` must be None or equal `router.top_k`. "
            f"Received: top_k={top_k}, router.top_k={own}"
        )


def make_shared_experts(
    experts: keras.layers.Layer, num_shared_experts: int
) -> keras.layers.Layer | None:
    """Return shared experts like the routed ones, initialized independently."""
    if num_shared_experts == 0:
        return None
    config = experts.get_config()
    if "num_experts" not in config:
        raise ValueError(
            "`num_shared_experts` needs experts with a `num_experts` argument. "
            f"Received: num_shared_experts={num_shared_experts}, experts={experts!r}"
        )
    shared = {"num_experts": num_shared_experts, "name": "shared_experts"}
    for name in ("kernel_initializer", "bias_initializer"):
        if name in config:
            # With a shared seed they would start as copies of the routed experts.
            shared[name] = independent(getattr(experts, name), config["num_experts"])
    if config.get("seed") is not None:
        shared["seed"] = config["seed"] + 2  # The router has seed + 1.
    return type(experts).from_config({**config, **shared})


def check_dispatch(dispatch: str, router: Any, experts: Any) -> None:
    """Raise ValueError if `dispatch` does not support the router or experts."""
    _checks.one_of("dispatch", dispatch, dispatch_lib.KNOWN)
    served = ("auto", *dispatch_lib.SERVED[router.choice])
    if dispatch not in served:
        raise ValueError(
            f"`dispatch` must be one of {list(served)} for the router "
            f"{type(router).__name__}. Received: dispatch={dispatch!r}"
        )
    dispatch_lib.check_serves(dispatch, experts)


def check_capacity_factor(
    factor: float | None, dispatch: str, router: Any, router_is_given: bool
) -> None:
    """Raise ValueError if there is no capacity to set, or the router sets it.

    `router_is_given` is whether the user passed a router object.
    """
    if factor is None:
        return
    full = router.choice == "expert" or dispatch in ("auto", "capacity")
    if not full or router.choice == "all":
        raise ValueError(
            '`capacity_factor` needs dispatch="capacity" or "auto" and a token-choice '
            "router, or an expert-choice router; else set it to None. Received: "
            f"capacity_factor={factor}, dispatch={dispatch!r}, "
            f"router={type(router).__name__}"
        )
    if router.choice == "expert" and router_is_given:
        raise ValueError(
            "`capacity_factor` must be set on the expert-choice router: it is how "
            "many tokens an expert chooses. Received: "
            f"capacity_factor={factor}, router={router!r}"
        )


def check_priority(
    priority: str, dispatch: str, capacity_factor: float | None, router: Any
) -> None:
    """Raise ValueError if a priority is set but experts have no capacity."""
    full = dispatch == "capacity" or (
        dispatch == "auto" and capacity_factor is not None
    )
    if priority != "position" and not (full and router.choice == "token"):
        raise ValueError(
            "`priority` needs a capacity (a `capacity_factor` or "
            'dispatch="capacity") and a token-choice router. Received: '
            f"priority={priority!r}, dispatch={dispatch!r}, "
            f"capacity_factor={capacity_factor}, router={type(router).__name__}"
        )


def checked_loss_weights(router: Any, **weights: float | None) -> dict[str, float]:
    """Return the nonzero loss weights; None means the router's default."""
    # Routers that are not subclasses of `Router` may lack these attributes.
    defaults = getattr(router, "default_loss_weights", {})
    supported: frozenset[str] = getattr(router, "supported_losses", frozenset())
    for name, weight in weights.items():
        if weight is None:
            weights[name] = defaults.get(name, 0.0)
            continue
        argument = f"{name}_loss_weight"
        weights[name] = _checks.finite_number(argument, weight)
        if weight != 0.0 and name not in supported:
            raise ValueError(
                f"`{argument}` must be 0 for the router "
                f"{type(router).__name__}, which does not support this loss. "
                f"Received: {argument}={weight}"
            )
    return {name: weight for name, weight in weights.items() if weight}


def make_metrics(
    names: Iterable[str], router: Any, layer: Layer
) -> RoutingMetrics | None:
    """Return a metric of the given figures for `layer`, or None if there are none."""
    known = sorted(RoutingMetrics.KNOWN)
    names = _checks.names_from("routing_metrics", names, known)
    if not names:
        return None
    needs_probs = sorted(RoutingMetrics.NEEDS_PROBS.intersection(names))
    # Custom routers may lack this attribute.
    if needs_probs and not getattr(router, "has_probs", True):
        raise ValueError(
            f"`routing_metrics` must not hold {needs_probs} for the router "
            f"{type(router).__name__}, which has no probabilities. Received: "
            f"routing_metrics={names!r}"
        )
    return RoutingMetrics(router.num_experts, names, layer.name, state_of=layer)
