"""What layers share: how they are named, and the arguments that many of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import _backend
from keras_moe._layer import Layer


def default_name(name: str) -> str:
    """Return "moe", "moe_1", ...: from the class name Keras would make "mo_e"."""
    count = keras.backend.get_uid(name)
    return name if count == 1 else f"{name}_{count - 1}"


class Adaptable(Layer):
    """A layer whose file remembers `quantize` and `enable_lora` of the layers inside.

    Keras keeps them in the config of the layer itself, which is in no file where an
    outer layer makes its own parts. Here they are in the outer layer's build config.
    """

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        layers = enumerate(self._flatten_layers(include_self=False))
        done = {str(i): self._done_to(layer) for i, layer in layers}
        done = {i: entry for i, entry in done.items() if entry}
        return {**config, "adapted": done} if config and done else config

    def _done_to(self, layer: keras.layers.Layer) -> dict[str, Any]:
        done: dict[str, Any] = {}
        mode = layer.quantization_mode
        if mode in ("gptq", "awq"):
            raise ValueError(
                f"{type(self).__name__} {self.name!r} cannot be saved with layers that "
                f'are quantized by "{mode}"; "int8", "int4" and "float8" can. '
                f"Received: {layer.path!r}"
            )
        if mode is not None:
            config = getattr(layer, "quantization_config", None)
            config = keras.saving.serialize_keras_object(config)
            done["quantize"] = {"mode": mode, "config": config}
        if getattr(layer, "lora_enabled", False):
            done["lora"] = {"rank": layer.lora_rank, "lora_alpha": layer.lora_alpha}
        return done

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        adapted = config.pop("adapted", {})
        super().build_from_config(config)
        layers = self._flatten_layers(include_self=False)
        for i, done in adapted.items():
            layer = layers[int(i)]
            # Layers that were given have it in a config of their own.
            if "quantize" in done and layer.quantization_mode is None:
                found = keras.saving.deserialize_keras_object(
                    done["quantize"]["config"]
                )
                layer.quantize(done["quantize"]["mode"], config=found)
            if "lora" in done and not layer.lora_enabled:
                layer.enable_lora(**done["lora"])


def check_experts(
    experts: Any,
    num_experts: int,
    expert_units: Any,
    any_layer: bool = False,
    argument: str = "experts",
) -> None:
    """Refuse what a dispatch could not call, or what contradicts `experts`.

    `any_layer` allows every layer that maps (..., d) to (..., e, u). `argument` is what
    the user calls `experts`: those of one level are a part of it.
    """
    if experts is None:
        if expert_units is None:
            raise ValueError(
                "`expert_units` must be given (the widths of an expert's layers), or "
                "`experts`. Received neither."
            )
        return
    if any_layer and not isinstance(experts, keras.layers.Layer):
        raise ValueError(
            f"`{argument}` must be a Keras layer; keras_moe.experts.LayerExperts "
            f"holds several of any kind. Received: {experts!r}"
        )
    if not any_layer and not hasattr(experts, "on_slots"):
        raise ValueError(
            f"`{argument}` must be a layer of keras_moe.experts; LayerExperts holds "
            f"Keras layers of any kind. Received: {argument}={experts!r}"
        )
    if expert_units is not None:
        raise ValueError(
            "`expert_units` must be None where `experts` is given, which has its own. "
            f"Received: expert_units={expert_units!r}"
        )
    found = getattr(experts, "num_experts", num_experts)
    if found != num_experts and argument == "experts":
        raise ValueError(
            "`num_experts` must be the number of experts in `experts`. Received: "
            f"num_experts={num_experts}, experts.num_experts={found}"
        )
    if found != num_experts:
        raise ValueError(
            f"`{argument}` must hold {num_experts} experts, those of all tasks and the "
            f"shared ones. Received: {argument}.num_experts={found}"
        )


def check_expert_outputs(symbolic: Any, expected: tuple[int | None, ...]) -> None:
    """Refuse experts whose outputs are not (..., e, u); `expected` is (..., e)."""
    shape: tuple[int | None, ...] = getattr(symbolic, "shape", ())
    if len(shape) != len(expected) + 1 or shape[-2] != expected[-1]:
        raise ValueError(
            "`experts` must map (..., d) to (..., e, u). Received: experts whose "
            f"outputs have the shape {tuple(shape)} instead of {(*expected, 'u')}"
        )


def check_leading_axes(
    argument: str,
    shape: Sequence[int | None] | None,
    inputs_shape: Sequence[int | None],
    features: int = 1,
) -> None:
    """Refuse leading axes that a reshape or a broadcast might take all the same.

    Args:
        argument: str, its name.
        shape: its shape, or None where there is no such input.
        inputs_shape: the shape of `inputs`.
        features: int, the axes behind the leading ones of `shape`.
    """
    if shape is None:
        return
    axes, leading = shape[: len(shape) - features], inputs_shape[:-1]
    same = len(axes) == len(leading) and all(
        a == b or a is None or b is None for a, b in zip(axes, leading, strict=True)
    )
    if not same:
        raise ValueError(
            f"`{argument}` must have the leading axes of `inputs`, {tuple(leading)}. "
            f"Received: inputs of shape {tuple(inputs_shape)}, {argument} of shape "
            f"{tuple(shape)}"
        )


def checked_rows(argument: str, tensor: Any, inputs: Any) -> Any:
    """Return a further input; one of another shape or, when run, batch is refused.

    A batch of another size would be broadcast or cut silently.
    """
    check_leading_axes(argument, tensor.shape, inputs.shape)
    return checked_batch(argument, tensor, inputs)


def checked_batch(argument: str, tensor: Any, inputs: Any) -> Any:
    """Return `tensor`; another batch is refused where only the run knows it."""
    if tensor.shape[0] is not None and inputs.shape[0] is not None:
        return tensor
    return _backend.assert_same_rows(
        tensor, inputs, f"`{argument}` must have the leading axes of `inputs`."
    )
