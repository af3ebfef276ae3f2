"""A sparse block of KerasHub as a `MoE` with its weights.

Axis letters: d input features, e experts, h hidden units.

The blocks compute every expert on every token and multiply by the routing weights, most
of which are 0; `MoE` computes the chosen experts. What differs between the blocks is
one row of a table: the names of their weights and arguments.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.convert._gated_shared_moe import GatedSharedMoE
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Where a block of KerasHub 0.32 keeps its weights and arguments."""

    router: str = "_sparse_feedforward_gate_dense"
    loss_weight: str = "router_aux_loss_coefficient"
    renormalize: str | None = "norm_top_k_prob"  # None: always.
    jitter: str | None = None
    # The kernels of the bank: [gate | up] as one, or gate and up.
    fused: bool = True
    shared_expert: str | None = None
    shared_gate: str | None = None


_KINDS = {
    "MixtralSparseMoeBlock": _Kind(
        loss_weight="router_aux_loss_coef",
        renormalize=None,
        jitter="router_jitter_noise",
        fused=False,
    ),
    "QwenSparseMoeBlock": _Kind(
        shared_expert="shared_expert_dense", shared_gate="shared_expert_gate_dense"
    ),
    "Qwen3SparseMoeBlock": _Kind(),
    "Qwen3_5MoeSparseMoeBlock": _Kind(
        router="_router_gate",
        renormalize=None,
        shared_expert="shared_expert",
        shared_gate="_shared_expert_gate",
    ),
}


def from_keras_hub(block: keras.layers.Layer) -> MoE:
    """Return a built `MoE` with the weights of a sparse block of KerasHub.

    It has the block's outputs, and in training its auxiliary loss, but computes only
    the experts that a token chose. `block` is not changed, and shares no variables.

    Args:
        block: a built block of a Mixtral, Qwen MoE, Qwen3 MoE or Qwen3.5 MoE model:
            `MixtralSparseMoeBlock`, `QwenSparseMoeBlock`, `Qwen3SparseMoeBlock` or
            `Qwen3_5MoeSparseMoeBlock`.

    Returns:
        A `MoE` that maps `(..., d)` to `(..., d)`, of the dtype policy and the name of
        `block`. For Qwen MoE and Qwen3.5 MoE it is a subclass that adds their shared
        expert, scaled by its sigmoid gate.

    Raises:
        ImportError: if KerasHub is not installed.
        ValueError: if `block` is not a built block of one of these kinds, or is
            quantized.

    Example:

    >>> decoder = backbone.transformer_layers[0]  # doctest: +SKIP
    >>> moe = keras_moe.convert.from_keras_hub(  # doctest: +SKIP
    ...     decoder._sparse_moe_block
    ... )
    >>> moe(tokens).shape == tokens.shape  # doctest: +SKIP
    True

    Where the two differ:

    - A block returns `(outputs, router_logits)`, a `MoE` the outputs alone.
    - A block adds its loss in training alone, a `MoE` also in evaluation.
    - A block computes padding; a `MoE` called with `mask` returns zeros there. The loss
      ignores padding in both.
    - `router_jitter_noise` multiplies the inputs of the router alone in a `MoE`.
    - The router of a `MoE` computes in float32 under any dtype policy.
    - One expert per token with a constant weight of 1 (`top_k=1`, renormalized) gives
      the router no gradient: a `MoE` refuses to train it.
    """
    kind = _kind_of(block)
    bank = _part(block, "expert_bank")
    router = _part(block, kind.router)
    if kind.fused:
        kernel = _value(_part(bank, "_expert_feedforward_gate_dense"))
        gate, up = np.split(kernel, 2, axis=-1)  # (e, d, 2h)
    else:
        gate = _value(_part(bank, "_expert_feedforward_gate_dense"))
        up = _value(_part(bank, "_expert_feedforward_intermediate_dense"))
    moe = _made(block, kind, features=gate.shape[1], hidden_units=gate.shape[2])
    moe.router.kernel.assign(_value(router.kernel))
    moe.experts.gate_kernel.assign(gate)
    moe.experts.up_kernel.assign(up)
    down = _part(bank, "_expert_feedforward_output_dense")
    moe.experts.down_kernel.assign(_value(down))
    trainable = {moe.router: router, moe.experts: bank}
    if isinstance(moe, GatedSharedMoE):
        trainable |= _copy_shared(moe, block, kind)
    for ours, theirs in trainable.items():
        ours.trainable = theirs.trainable
    return moe


def is_block(layer: Any) -> bool:
    """Return whether `layer` is a block that `from_keras_hub` knows, built or not."""
    return class_of(layer) in _KINDS


def _made(block: Any, kind: _Kind, *, features: int, hidden_units: int) -> MoE:
    """Return a built `MoE` with the arguments of a block, but not its weights."""
    shared = {
        "dtype": block.dtype_policy,
        "kernel_initializer": block.kernel_initializer,
    }
    num_experts, top_k = _part(block, "num_experts"), _part(block, "top_k")
    renormalize = kind.renormalize is None or _part(block, kind.renormalize)
    arguments: dict[str, Any] = {
        "router": TopKRouter(
            num_experts,
            top_k,
            renormalize=bool(renormalize),
            jitter=0.0 if kind.jitter is None else _part(block, kind.jitter),
            name="router",
            **shared,
        ),
        "experts": GLUExperts(num_experts, hidden_units, name="experts", **shared),
        "load_balancing_loss_weight": _part(block, kind.loss_weight),
        "name": block.name,
        **shared,
    }
    if kind.shared_expert is None:
        moe = MoE(**arguments)
    else:
        dense = _part(block, kind.shared_expert)._feedforward_gate_dense
        moe = GatedSharedMoE(shared_hidden_units=dense.kernel.shape[1], **arguments)
    moe.build((None, None, features))
    return moe


def _copy_shared(moe: GatedSharedMoE, block: Any, kind: _Kind) -> dict[Any, Any]:
    """Copy the shared expert and its gate; return their layers by ours."""
    shared = _part(block, str(kind.shared_expert))
    gate = _part(block, str(kind.shared_gate))
    for ours, theirs in {
        "gate_kernel": "_feedforward_gate_dense",
        "up_kernel": "_feedforward_intermediate_dense",
        "down_kernel": "_feedforward_output_dense",
    }.items():
        kernel = _value(_part(shared, theirs).kernel)
        getattr(moe.shared_expert, ours).assign(kernel[None])  # (1, d, h)
    moe.shared_gate.kernel.assign(_value(gate.kernel))
    return {moe.shared_expert: shared, moe.shared_gate: gate}


def _kind_of(block: Any) -> _Kind:
    """Return the kind of a block; raise unless it is one that can be converted."""
    name = class_of(block)
    if name is None and importlib.util.find_spec("keras_hub") is None:
        raise ImportError(
            "`block` must be a sparse block of KerasHub, which is not installed: "
            f"pip install keras-hub. Received: block={block!r}"
        )
    if name not in _KINDS:
        raise ValueError(
            f"`block` must be one of KerasHub's {', '.join(_KINDS)}; for all blocks of "
            f"a model: replace_keras_hub_blocks(model). Received: block={block!r}"
        )
    if not block.built:
        raise ValueError(
            "`block` must be built: call it once, or its model. "
            f"Received: block={block!r}, which has no weights"
        )
    for layer in block._flatten_layers():
        if getattr(layer, "quantization_mode", None) is not None:
            raise ValueError(
                "`block` must not be quantized: convert it before. Received: "
                f"block={block!r}, quantized to {layer.quantization_mode}"
            )
    return _KINDS[name]


def class_of(layer: Any) -> str | None:
    """Return the name of KerasHub's class that `layer` is of, or None."""
    for kind in type(layer).__mro__:
        if kind.__module__.split(".")[0] == "keras_hub":
            return kind.__name__
    return None


def _part(layer: Any, name: str) -> Any:
    """Return a private attribute of a block, which another KerasHub may lack."""
    if not hasattr(layer, name):
        raise ValueError(
            "`block` must have the attributes of KerasHub 0.32; KerasHub "
            f"{importlib.metadata.version('keras-hub')} has no `{name}` there. "
            f"Received: block with {layer!r}"
        )
    return getattr(layer, name)


def _value(variable: Any) -> np.ndarray:
    # A copy, because JAX donates the buffers of a model in training.
    return np.array(ops.convert_to_numpy(variable))
