"""Soft mixture of experts: slots are mixtures of tokens, outputs mixtures of slots.

Axis letters: t tokens of a sequence, d input features, e experts, s slots per expert,
m = e * s slots of all experts, u output units.

For one sequence X with logits of shape (t, m) (Puigcerver et al. 2023, section 2): the
slots are D^T X, with D the softmax of the logits over the tokens. Each expert computes
its s slots. The outputs are C Y, with Y the expert outputs of all slots, and C the
softmax of the logits over the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.initializers import independent
from keras_moe.layers._mlp_layer import MLPLayer
from keras_moe.layers._parts import (
    check_experts,
    checked_expert_units,
    deserialized,
    expert_count,
    layer_name,
    serialized,
)


@keras.saving.register_keras_serializable("keras_moe")
class SoftMoE(MLPLayer):
    """Soft Mixture-of-Experts: each expert computes a few mixtures of tokens.

    There is no discrete routing and no dropped token, so the layer is fully
    differentiable and needs no balance loss. Each expert computes `slots_per_expert`
    rows per sequence, whatever its length.

    Tokens of a sequence are mixed in both directions, so the layer is not causal and
    not suited to autoregressive models. Sequences of a batch are never mixed.

    Args:
        num_experts: int, number of experts e. Default: that of `experts`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        slots_per_expert: int, number of slots s per expert and sequence.
        activation: activation of the hidden layers of an expert; its last layer is
            linear.
        experts: a layer of `keras_moe.experts`, instead of the default `MLPExperts`.
            The expert arguments (`activation`, and from `use_bias` to
            `kernel_regularizer`) are then ignored.
        normalize: bool, whether tokens and the columns of `phi` are L2-normalized and
            their products multiplied by a learned `scale`. If False, the logits are
            `X phi`, and both softmaxes saturate as d grows.
        phi_initializer: initializer of `phi`.
        use_bias: bool, whether the expert layers add a bias.
        dropout: float in [0, 1), fraction of an expert's hidden units to drop.
        kernel_initializer: initializer of one expert's kernel.
        kernel_regularizer: regularizer of the stacked expert kernels.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., t, d)`, of rank >= 3.
        mask: bool tensor of shape `(..., t)`, False for padding, which is in no slot
            and has outputs of zero.
        training: bool, whether dropout is active.

    Returns:
        A tensor of shape `(..., t, u)`. A token whose logits are not finite is treated
        as padding in the slots, and its output is NaN.

    Attributes:
        phi: variable of shape `(d, m)`; the columns k s to (k + 1) s - 1 belong to
            expert k.
        scale: scalar variable, 1 at the start; None without `normalize`.
        experts: the layer of experts.

    Raises:
        ValueError: if an argument is invalid, or the inputs have a rank below 3.

    Example:

    >>> soft_moe = keras_moe.layers.SoftMoE(
    ...     num_experts=4, expert_units=(32, 16), slots_per_expert=2
    ... )
    >>> soft_moe(np.ones((2, 5, 16))).shape == (2, 5, 16)
    True

    The logits and both softmaxes are computed in float32 under any dtype policy, then
    cast once.

    References:
        - [Puigcerver et al., 2023: From Sparse to Soft Mixtures of Experts](
          https://arxiv.org/abs/2308.00951)
    """

    least_rank = 3
    rank_reason = ": it mixes the tokens of a sequence, not the examples of a batch"

    def __init__(
        self,
        num_experts: int | None = None,
        expert_units: int | Sequence[int] | None = None,
        slots_per_expert: int = 1,
        *,
        experts: keras.layers.Layer | None = None,
        normalize: bool = True,
        phi_initializer: Any = "lecun_normal",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {"activation": "gelu", **kwargs}
        super().__init__(name=layer_name(name, "soft_moe"), **kwargs)
        self.num_experts = expert_count(num_experts, experts)
        self.expert_units = checked_expert_units(expert_units)
        self.slots_per_expert = _checks.positive_int(
            "slots_per_expert", slots_per_expert
        )
        self.normalize = _checks.flag("normalize", normalize)
        self.phi_initializer = _checks.initializer("phi_initializer", phi_initializer)
        self._experts_given = experts is not None
        check_experts(experts, self.num_experts, expert_units)
        if experts is None:
            experts = self.make_mlps(self.num_experts, self.expert_units, "experts")
        self.experts = experts

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        _check_rank(input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=3, axes={-1: features})
        self.phi = self.add_weight(
            name="phi",
            shape=(features, self.num_experts * self.slots_per_expert),
            # A longer key than in `PerExpert` keeps phi different from expert kernels.
            initializer=independent(self.phi_initializer, 0, 0, 1),
            autocast=False,
        )
        self.scale = None
        if self.normalize:
            self.scale = self.add_weight(
                name="scale", shape=(), initializer="ones", autocast=False
            )
        if not self.experts.built:
            self.experts.build((None, features))

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        # With integer inputs the mixture weights would be rounded to zero.
        inputs = ops.cast(inputs, self.compute_dtype)
        if mask is not None:
            mask = ops.expand_dims(ops.cast(mask, "bool"), -1)  # (..., t, 1)
            # Keeps NaN in padding out of the gradients.
            inputs = ops.where(mask, inputs, ops.zeros_like(inputs))
        logits = self._logits(inputs)  # (..., t, m)
        dispatch, combine, present = _mixtures(logits, mask)
        tokens = ops.where(present, inputs, ops.zeros_like(inputs))
        dispatch = ops.cast(dispatch, tokens.dtype)
        slots = ops.matmul(ops.swapaxes(dispatch, -1, -2), tokens)  # (..., m, d)
        outputs = self._on_slots(slots, training)  # (..., m, u)
        return ops.matmul(ops.cast(combine, outputs.dtype), outputs)

    def gate_weights(self, inputs: Any, mask: Any = None) -> Any:
        """Return the share of each expert in the output of a token: `(..., t, e)`.

        It is the sum over the slots of the expert.
        """
        if not self.built:
            self(inputs)
        inputs = ops.convert_to_tensor(inputs)
        if mask is not None:
            mask = ops.expand_dims(ops.cast(mask, "bool"), -1)
        _, combine, _ = _mixtures(self._logits(inputs), mask)
        leading = _backend.restored_axes(ops.shape(combine)[:-1])
        by_slot = (*leading, self.num_experts, self.slots_per_expert)
        return ops.sum(ops.reshape(combine, by_slot), axis=-1)

    def _logits(self, inputs: Any) -> Any:
        dtype = self.precise_dtype
        tokens, phi = ops.cast(inputs, dtype), ops.cast(self.phi, dtype)
        if self.scale is None:
            return ops.matmul(tokens, phi)
        scale = ops.cast(self.scale, dtype)
        return ops.matmul(_l2_normalize(tokens, -1), scale * _l2_normalize(phi, 0))

    def _on_slots(self, slots: Any, training: bool | None) -> Any:
        """(..., m, d) -> (..., m, u): apply each expert to its slots."""
        leading = ops.shape(slots)[:-2]
        e, s, d = self.num_experts, self.slots_per_expert, slots.shape[-1]
        slots = ops.transpose(ops.reshape(slots, (-1, e, s, d)), (1, 0, 2, 3))
        slots = ops.reshape(slots, (e, -1, d))
        outputs = self.experts.on_slots(slots, training=training)
        u = outputs.shape[-1]
        outputs = ops.transpose(ops.reshape(outputs, (e, -1, s, u)), (1, 0, 2, 3))
        # A reshape can infer only one axis, here the batch.
        return ops.reshape(outputs, (-1, *leading[1:], e * s, u))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return mask

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        _check_rank(input_shape)
        units = self.experts.compute_output_shape((None, input_shape[-1]))[-1]
        return (*input_shape[:-1], units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "expert_units": self.expert_units,
            "slots_per_expert": self.slots_per_expert,
            "experts": serialized(self.experts) if self._experts_given else None,
            "normalize": self.normalize,
            "phi_initializer": keras.initializers.serialize(self.phi_initializer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SoftMoE:
        return cls(**{**config, "experts": deserialized(config.get("experts"))})


def _mixtures(logits: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Return D (..., t, m), C (..., t, m), and a mask of the tokens in the slots.

    Padding is 0 in both. A token whose logits are not finite is 0 in D and, unless it
    is padding, NaN in C.
    """
    finite = ops.all(ops.isfinite(logits), axis=-1, keepdims=True)
    present = finite if mask is None else ops.logical_and(finite, mask)
    # Finite, not -inf: all tokens of a sequence may be padding.
    absent = ops.full_like(logits, _LOWEST)
    dispatch = _softmax(ops.where(present, logits, absent), axis=-2)
    dispatch = ops.where(present, dispatch, ops.zeros_like(dispatch))
    combine = _softmax(logits, axis=-1)
    if mask is not None:
        combine = ops.where(mask, combine, ops.zeros_like(combine))
    return dispatch, combine, present


_LOWEST = -3.0e38


def _softmax(logits: Any, axis: int) -> Any:
    """Softmax over an axis of any size; Keras warns for size 1 and fails for 0."""
    peak = ops.max(logits, axis=axis, keepdims=True, initial=_LOWEST)
    shares = ops.exp(logits - ops.stop_gradient(peak))
    return shares / ops.sum(shares, axis=axis, keepdims=True)


def _l2_normalize(vectors: Any, axis: int) -> Any:
    """L2-normalize vectors; the floor of 1e-6 gives zeros a finite gradient."""
    squared = ops.sum(ops.square(vectors), axis=axis, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squared, 1e-12))


def _check_rank(shape: tuple[int | None, ...]) -> None:
    if len(shape) < 3:
        raise ValueError(
            "SoftMoE expects inputs of rank >= 3, (..., tokens, features)"
            f"{SoftMoE.rank_reason}. Received an input of shape {tuple(shape)}"
        )
