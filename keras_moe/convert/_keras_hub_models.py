"""A model of KerasHub with every sparse block replaced by a `MoE`, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_moe.convert._keras_hub import class_of, from_keras_hub, is_block
from keras_moe.layers import MoE


def replace_keras_hub_blocks(model: keras.Model) -> list[MoE]:
    """Replace every sparse block of a KerasHub model by a `MoE`, in place.

    The model then has the same outputs, and with a greedy sampler it generates the same
    tokens; KerasHub's default sampler draws them at random. Outputs at padding, which
    no other position reads, may differ. An optimizer that has already trained the model
    knows the old variables: compile the model again to train it.

    The class of the model still makes KerasHub's blocks, so a file of the changed
    model is one of weights: `model.save_weights`, and `load_weights` of a model with
    replaced blocks.

    Args:
        model: a KerasHub backbone or task, such as `MixtralCausalLM`, or another model
            with such layers, with blocks of the kinds that `from_keras_hub` converts.

    Returns:
        The new `MoE` layers, in the order of the model's layers.

    Raises:
        ValueError: if `model` is not a Keras model or has no such block.

    Example:

    >>> language_model = keras_hub.models.MixtralCausalLM(  # doctest: +SKIP
    ...     backbone, preprocessor
    ... )
    >>> moes = keras_moe.convert.replace_keras_hub_blocks(  # doctest: +SKIP
    ...     language_model
    ... )
    >>> language_model.compile(sampler="greedy")  # doctest: +SKIP
    >>> language_model.generate("The experts", max_length=32)  # doctest: +SKIP
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: model={model!r}")
    layers = list(_walk(model, set()))
    places = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if is_block(value)
    ]
    if not places:
        others = {class_of(layer) or "" for layer in layers if _is_sparse(layer)}
        kinds = ", ".join(sorted(others))
        has = f"which has only {kinds}" if others else "which has none"
        raise ValueError(
            "`model` must have a sparse block of KerasHub's Mixtral or Qwen MoE "
            f"models. Received: model {model.name!r} of type {type(model).__name__}, "
            f"{has}"
        )
    # All are converted before the first is replaced: an error changes nothing.
    new = [from_keras_hub(block) for _, _, block in places]
    for (owner, name, block), moe in zip(places, new, strict=True):
        _replace(owner, name, block, _AsBlock(moe))
    for layer in layers:
        if isinstance(layer, keras.Model):
            _forget_compiled(layer)
    return new


class _AsBlock(keras.layers.Layer):
    """A `MoE` that is called as a block of KerasHub is, and returns what it returns.

    Call arguments:
        hidden_states: tensor of shape `(batch, length, d)`.
        attention_mask: `(batch, length)`, or `(batch, length, length)` with a query
            axis first. 0 for padding, which adds to no loss.

    Returns:
        The outputs, and the router's logits of shape `(batch * length, e)`.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__(name=moe.name, dtype=moe.dtype_policy)
        self.moe = moe
        self.built = True

    def call(
        self, hidden_states: Any, attention_mask: Any = None, training: Any = None
    ) -> tuple[Any, Any]:
        mask = attention_mask
        if mask is not None:
            mask = ops.cast(mask, "bool")
            mask = ops.any(mask, axis=-1) if len(mask.shape) == 3 else mask
        outputs = self.moe(hidden_states, mask=mask, training=training)
        rows = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
        # Where nothing reads the logits, a compiled graph leaves this product out.
        kernel = ops.cast(self.moe.router.kernel, rows.dtype)
        return outputs, ops.matmul(rows, kernel)


def _is_sparse(layer: Any) -> bool:
    """Whether the class of a layer of KerasHub has the name of a sparse block."""
    name = (class_of(layer) or "").lower()
    return "moe" in name or "expert" in name


def _walk(layer: Any, seen: set[int]) -> Iterator[Any]:
    """Yield a layer and its sublayers, each once, in the order of the model."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for part in layer._layers:
        yield from _walk(part, seen)


def _replace(owner: Any, name: str, old: Any, new: Any) -> None:
    """Set an attribute of a built layer, and track the new layer instead of the old."""
    locked = owner._tracker.locked
    owner._tracker.unlock()
    owner._tracker.untrack(old)
    setattr(owner, name, new)
    if locked:
        owner._tracker.lock()


def _forget_compiled(model: Any) -> None:
    """Drop compiled functions, which hold the replaced layers."""
    for name in (
        "train_function",
        "test_function",
        "predict_function",
        "generate_function",
    ):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
