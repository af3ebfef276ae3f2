"""Helpers that layers share: default names and checks of common arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import _backend, _checks
from keras_moe._layer import Layer


def layer_name(given: str | None, default: str) -> str:
    """Return `given`, or "moe", "moe_1", ...; Keras would make "mo_e" of the class."""
    if given is not None:
        return given
    count = keras.backend.get_uid(default)
    return default if count == 1 else f"{default}_{count - 1}"


class HasDispatch:
    """A layer whose `dispatch` can be changed after it was made."""

    @property
    def dispatch(self) -> str:
        """How rows are sent to experts.

        Can be changed without changing the weights. A model that has traced its
        functions keeps the old dispatch until it is compiled again.
        """
        return self._dispatch

    @dispatch.setter
    def dispatch(self, name: str) -> None:
        self._check_dispatch(name)
        self._dispatch = name

    def _has_capacity(self) -> bool:
        """Whether experts take a limited number of choices."""
        return False

    def _resolve_dispatch(self) -> str:
        """Return the dispatch for the graph that is being traced."""
        raise NotImplementedError

    def _check_dispatch(self, name: str) -> None:
        """Raise ValueError if the layer does not support the dispatch."""
        raise NotImplementedError


class Adaptable(Layer):
    """A layer that saves `quantize` and `enable_lora` of its sublayers.

    Keras saves them in the config of the sublayer, but a layer that creates its
    sublayers does not save their configs. Here the outer layer's build config has them.
    """

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        layers = enumerate(self._flatten_layers(include_self=False))
        done = {str(i): self._adaptations(layer) for i, layer in layers}
        done = {i: entry for i, entry in done.items() if entry}
        return {**config, "adapted": done} if config and done else config

    def _adaptations(self, layer: keras.layers.Layer) -> dict[str, Any]:
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
            # Sublayers passed by the user have it in their own config.
            if "quantize" in done and layer.quantization_mode is None:
                found = keras.saving.deserialize_keras_object(
                    done["quantize"]["config"]
                )
                layer.quantize(done["quantize"]["mode"], config=found)
            if "lora" in done and not layer.lora_enabled:
                layer.enable_lora(**done["lora"])


def expert_count(num_experts: Any, experts: Any, router: Any = None) -> int:
    """Return `num_experts`, by default that of given experts or a given router."""
    if isinstance(experts, list | tuple):
        raise ValueError(
            "`experts` must be one layer: wrap several in "
            f"keras_moe.experts.LayerExperts([...]). Received: experts={experts!r}"
        )
    if num_experts is not None:
        return _checks.positive_int("num_experts", num_experts)
    counts = [getattr(part, "num_experts", None) for part in (experts, router)]
    known = [count for count in counts if count is not None]
    if not known:
        raise ValueError(
            "`num_experts` must be given, or `experts` with an attribute "
            f"`num_experts`. Received: num_experts=None, experts={experts!r}"
        )
    if len({*known}) > 1:
        raise ValueError(
            "`experts` and `router` must have the same number of experts. Received: "
            f"experts.num_experts={known[0]}, router.num_experts={known[1]}"
        )
    return _checks.positive_int("num_experts", known[0])


def checked_expert_units(expert_units: Any) -> tuple[int, ...] | None:
    """Return the widths of an expert's layers; None for given experts."""
    if expert_units is None:
        return None
    return _checks.unit_sizes("expert_units", expert_units)


def serialized(parts: Any) -> Any:
    """Return the config of a layer, of a sequence of layers, or None."""
    if isinstance(parts, list | tuple):
        return [keras.saving.serialize_keras_object(part) for part in parts]
    return None if parts is None else keras.saving.serialize_keras_object(parts)


def deserialized(parts: Any) -> Any:
    """Return the layers of a config; layers stay as they are."""
    if isinstance(parts, list | tuple):
        return [deserialized(part) for part in parts]
    is_config = isinstance(parts, dict)
    return keras.saving.deserialize_keras_object(parts) if is_config else parts


def check_experts(
    experts: Any,
    num_experts: int,
    expert_units: Any,
    any_layer: bool = False,
    argument: str = "experts",
) -> None:
    """Raise ValueError if `experts` is unusable or contradicts other arguments.

    `any_layer` allows every layer that maps (..., d) to (..., e, u). `argument` is the
    name in messages, such as "experts[1]" for the experts of a level.
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
            f"wraps several layers. Received: {experts!r}"
        )
    if not any_layer and not hasattr(experts, "on_slots"):
        raise ValueError(
            f"`{argument}` must be a layer of keras_moe.experts, or have the methods "
            "of the protocol keras_moe.experts.Experts; LayerExperts wraps other Keras "
            f"layers. Received: {argument}={experts!r}"
        )
    if expert_units is not None:
        raise ValueError(
            "`expert_units` must be None if `experts` is given. "
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
            f"`{argument}` must hold {num_experts} experts, task and shared ones "
            f"together. Received: {argument}.num_experts={found}"
        )


def check_expert_outputs(symbolic: Any, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError if outputs are not (..., e, u); `expected` is (..., e)."""
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
    """Raise ValueError if leading axes differ; a reshape might accept them.

    Args:
        argument: str, name of the argument.
        shape: shape of the argument, or None if it was not given.
        inputs_shape: the shape of `inputs`.
        features: int, number of axes of `shape` after the leading ones.
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
    """Return `tensor` after checking that its leading axes are those of `inputs`.

    A different batch size would be broadcast or truncated silently.
    """
    check_leading_axes(argument, tensor.shape, inputs.shape)
    return checked_batch(argument, tensor, inputs)


def checked_batch(argument: str, tensor: Any, inputs: Any) -> Any:
    """Return `tensor`, with a runtime check of the batch size if it is unknown."""
    if tensor.shape[0] is not None and inputs.shape[0] is not None:
        return tensor
    return _backend.assert_same_rows(
        tensor, inputs, f"`{argument}` must have the leading axes of `inputs`."
    )
