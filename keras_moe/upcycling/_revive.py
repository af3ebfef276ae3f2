"""Dead experts start again, from a copy of a used one.

Axis letters: d input features, e experts, g gates.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.experts._stacked import StackedKernels
from keras_moe.layers import MMoE, MoE


def revive(
    layer: keras.layers.Layer,
    experts: int | Sequence[int],
    *,
    source: int,
    noise: float = 0.1,
    seed: int | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> None:
    """Give experts the weights of another one, with noise, in place.

    For experts that a router or the gates do not use, which therefore get no gradient.
    Their column in the router or the gates is copied too, with noise: rows that went to
    the source are then shared among it and its copies.

    Args:
        layer: a built `MoE` whose router has kernels `(d, e)`, or an `MMoE`, with
            experts of stacked kernels (`MLPExperts`, `GLUExperts`).
        experts: int or sequence of ints, the experts to replace.
        source: int, the expert to copy.
        noise: float > 0. Gaussian noise of this share of the standard deviation of each
            weight of the source is added to its copies.
        seed: int, the seed of the noise.
        optimizer: the optimizer of the model. Its slots (momentums and so on) of the
            replaced weights become 0, and averages of weights (`use_ema`) the weights.
            Not Ftrl, whose slots are the weights, or Adafactor, whose slots are of all
            experts together.

    Raises:
        TypeError: if `layer` is of another class.
        ValueError: if it is not built, if its router or experts cannot be copied so, or
            if an argument is invalid.

    Example:

    >>> moe = keras_moe.layers.MoE(num_experts=3, expert_units=2, top_k=1)
    >>> outputs = moe(np.ones((4, 5)))
    >>> keras_moe.upcycling.revive(moe, [2], source=0, noise=1e-6)
    >>> kernel = np.asarray(moe.experts.kernels[0])
    >>> bool(np.allclose(kernel[2], kernel[0], atol=1e-3))
    True
    """
    replaced = _checked(layer, experts, source, optimizer)
    noise = _checks.positive_number("noise", noise)
    rng = np.random.default_rng(_checks.seed(seed))
    for weight, axis in _by_expert(layer):
        value = np.moveaxis(np.array(ops.convert_to_numpy(weight)), axis, 0)
        spread = noise * value[source].std() if weight.trainable else 0.0
        for k in replaced:
            draws = rng.normal(size=value[source].shape)
            value[k] = value[source] + (spread * draws).astype(value.dtype)
        weight.assign(np.moveaxis(value, 0, axis))
        for name, slot in _slots(optimizer, weight):
            part = np.moveaxis(np.array(ops.convert_to_numpy(slot)), axis, 0)
            is_average = name == "_model_variables_moving_average"
            part[replaced] = value[replaced] if is_average else 0.0
            slot.assign(np.moveaxis(part, 0, axis))


def _by_expert(layer: Any) -> Iterator[tuple[Any, int]]:
    """Yield the weights that have the experts as an axis, and which one."""
    e = layer.num_experts
    for weight in layer.experts.weights:
        yield weight, 0
    if isinstance(layer, MoE):
        for weight in layer.router.weights:
            if weight.shape and weight.shape[-1] == e:
                yield weight, len(weight.shape) - 1
        return
    yield layer.gates.kernels[-1], 2  # (g, d, e)
    for bias in layer.gates.biases[-1:]:
        yield bias, 1


def _slots(optimizer: Any, weight: Any) -> list[tuple[str, Any]]:
    """Return the slots of `weight` that have its shape, by the name of their list."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    trained = [] if optimizer is None else optimizer._trainable_variables
    index = next((i for i, own in enumerate(trained) if own is weight), None)
    if index is None:
        return []
    lists = {k: v for k, v in vars(optimizer).items() if isinstance(v, list)}
    found = [(k, v[index]) for k, v in lists.items() if len(v) == len(trained)]
    return [
        (name, slot)
        for name, slot in found
        if slot is not weight and getattr(slot, "shape", None) == weight.shape
    ]


def can_revive(layer: Any) -> bool:
    """Whether `revive` supports a built layer."""
    try:
        _check_layer(layer)
    except (TypeError, ValueError):
        return False
    return True


def check_optimizer(optimizer: Any) -> None:
    """Raise ValueError unless `revive` can reset an expert's part of the slots."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner, keras.optimizers.Ftrl | keras.optimizers.Adafactor):
        raise ValueError(
            "`optimizer` must have slots that can start from 0 for one expert. "
            f"Received: optimizer of type {type(inner).__name__}"
        )


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, MoE | MMoE):
        raise TypeError(
            f"`layer` must be a MoE or an MMoE. Received: layer={layer!r} of type "
            f"{type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(
            "`layer` must be built. Received: a layer that has not been called yet"
        )
    e = layer.num_experts
    stacked = isinstance(layer.experts, StackedKernels) and all(
        weight.shape[:1] == (e,) for weight in layer.experts.weights
    )
    if not stacked:
        raise ValueError(
            "`layer.experts` must have stacked kernels, such as MLPExperts. "
            f"Received: layer.experts={layer.experts!r}"
        )
    if isinstance(layer, MoE):
        kernel = getattr(layer.router, "kernel", None)
        if kernel is None or len(kernel.shape) != 2 or kernel.shape[-1] != e:
            raise ValueError(
                "`layer.router` must have a kernel of the shape (features, experts), "
                "such as TopKRouter. "
                f"Received: layer.router={layer.router!r}"
            )


def _checked(layer: Any, experts: Any, source: Any, optimizer: Any) -> list[int]:
    _check_layer(layer)
    check_optimizer(optimizer)
    e = layer.num_experts
    given = [experts] if isinstance(experts, numbers.Integral) else experts
    replaced = [
        _checks.count("experts", k)
        for k in _checks.items("experts", given, "expert indices")
    ]
    source = _checks.count("source", source)
    for name, k in [("source", source), *(("experts", k) for k in replaced)]:
        if k >= e:
            raise ValueError(
                f"`{name}` must be below the number of experts, {e}. Received: {k}"
            )
    if source in replaced or not replaced:
        raise ValueError(
            "`experts` must name at least one expert, and not `source`. "
            f"Received: experts={experts!r}, source={source}"
        )
    return replaced
