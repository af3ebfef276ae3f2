"""What layers with experts share: how they are named, and the argument `experts`."""

from __future__ import annotations

from typing import Any

import keras


def default_name(name: str) -> str:
    """Return "moe", "moe_1", ...: from the class name Keras would make "mo_e"."""
    count = keras.backend.get_uid(name)
    return name if count == 1 else f"{name}_{count - 1}"


def check_experts(
    experts: Any, num_experts: int, expert_units: Any, any_layer: bool = False
) -> None:
    """Refuse what a dispatch could not call, or what contradicts `experts`.

    `any_layer` allows every layer that maps (..., d) to (..., e, u).
    """
    if experts is None:
        if expert_units is None:
            raise ValueError(
                "`expert_units` must be given (the widths of an expert's layers), or "
                "`experts`. Received neither."
            )
        return
    if any_layer and not isinstance(experts, keras.layers.Layer):
        raise ValueError(f"`experts` must be a Keras layer. Received: {experts!r}")
    if not any_layer and not hasattr(experts, "on_slots"):
        raise ValueError(
            "`experts` must be a layer of keras_moe.experts; LayerExperts holds Keras "
            f"layers of any kind. Received: experts={experts!r}"
        )
    if expert_units is not None:
        raise ValueError(
            "`expert_units` must be None where `experts` is given, which has its own. "
            f"Received: expert_units={expert_units!r}"
        )
    if getattr(experts, "num_experts", num_experts) != num_experts:
        raise ValueError(
            "`num_experts` must be the number of experts in `experts`. Received: "
            f"num_experts={num_experts}, experts.num_experts={experts.num_experts}"
        )
