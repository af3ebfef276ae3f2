"""Multi-gate mixture of experts with differentiable k-sparse gates.

Axis letters: n rows, d input features, e experts, t tasks, k selectors per gate, m bits
of an expert's index, u expert output units.

A selector r(z) encodes the index of an expert in m = ceil(log2 e) smooth bits, and a
gate is a softmax mixture of k selectors (Hazimeh et al. 2021, section 3):

q = sum_k softmax(w)_k r(z_k),  r(z)_i = prod_j S(z_j) if bit j of i is 1, else
1 - S(z_j).

S is a smooth step, exactly 0 below -gamma / 2 and exactly 1 above gamma / 2, so a gate
whose bits have converged to 0 or 1 has at most k nonzero weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, losses
from keras_moe._layer import given_or_attached
from keras_moe.experts import MLPExperts
from keras_moe.initializers import PerExpert
from keras_moe.layers._mixture import Mixture
from keras_moe.layers._parts import (
    check_expert_outputs,
    checked_rows,
    expert_count,
    layer_name,
)


@keras.saving.register_keras_serializable("keras_moe")
class DSelectK(Mixture):
    """`MMoE` with sparse gates that are differentiable: DSelect-k.

    Every task learns to use at most k of the shared experts. A top-k gate has no
    gradient for unselected experts and is discontinuous where the selection changes;
    this one is smooth everywhere. It starts as a mixture of all experts and becomes
    sparse in training. The cost does not fall: every expert is computed.

    Args:
        num_experts: int >= 2, number of shared experts e. Default: that of `experts`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        top_k: int, maximum number of experts per gate after convergence, k.
        gamma: float > 0, the width of the smooth step. Gates converge sooner with a
            narrow step, later with a wide one.
        entropy_loss_weight: float, weight of the selectors' entropy as a loss, which
            drives their bits to 0 or 1. Gates become sparse sooner with a larger
            weight. (`entropy_weight`, its old name, is accepted too.)
        static: bool, whether a task's gate is the same for every row. By default it is
            linear in the inputs of the gates.
        experts: a layer that maps `(..., d)` to `(..., e, u)` and that no other layer
            uses, instead of the default `MLPExperts`. The expert arguments (from
            `activation` to `kernel_regularizer`) are then ignored.
        activation: activation of every expert layer, the last one included.
        use_bias: bool, whether the expert layers add a bias.
        dropout: float in [0, 1), fraction of an expert's hidden units to drop.
        kernel_initializer: initializer of one expert's kernel.
        kernel_regularizer: regularizer of the stacked expert kernels.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        gate_inputs: tensor of shape `(..., g)` with the leading axes of `inputs`,
            the inputs of the gates. Default: `inputs`. Not with `static`.
        mask: bool tensor of the leading axes, False for rows to exclude from the
            losses.
        training: bool, whether dropout is active.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid, if the leading axes of
            `gate_inputs` are not those of `inputs`, or if `experts` gives outputs of
            another shape.

    Example:

    >>> layer = keras_moe.layers.DSelectK(
    ...     num_experts=8, expert_units=(32, 16), tasks=["click", "buy"], top_k=2
    ... )
    >>> x = np.ones((4, 6))
    >>> layer(x)["buy"].shape == (4, 16), layer.gate_weights(x).shape == (4, 2, 8)
    (True, True)

    If e is not a power of two, some m-bit indices have no expert. As in the authors'
    code, gate weights may then sum to less than 1 before convergence, and a loss
    `1 / (sum of r(z)) - 1` per selector penalizes such indices. Here losses are means
    over rows, independent of the batch size; in the authors' code they are sums over
    rows, and each is larger by 1, which does not change the gradient.

    Gates are computed in float32 under any dtype policy, then cast once.

    References:
        - [Hazimeh et al., 2021: DSelect-k: Differentiable Selection in the Mixture of
          Experts with Applications to Multi-Task Learning](
          https://arxiv.org/abs/2106.03760)
        - [Hazimeh et al., 2020: The Tree Ensemble Layer](
          https://arxiv.org/abs/2002.07772), for the smooth step
    """

    def __init__(
        self,
        num_experts: int | None = None,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        top_k: int = 2,
        *,
        gamma: float = 1.0,
        entropy_loss_weight: float = 0.0,
        static: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        name = layer_name(name, "dselect_k")
        # Its old name, also in the configs of old files.
        if "entropy_weight" in kwargs:
            if entropy_loss_weight != 0.0:
                raise ValueError(
                    "`entropy_weight`, the old name of `entropy_loss_weight`, must not "
                    f"be given too. Received: entropy_weight={kwargs['entropy_weight']}"
                )
            entropy_loss_weight = kwargs.pop("entropy_weight")
        super().__init__(expert_units, tasks, name=name, **kwargs)
        self.num_experts = _checked_num_experts(
            expert_count(num_experts, self._experts_given)
        )
        self.num_bits = (self.num_experts - 1).bit_length()
        self.top_k = _checks.top_k(top_k, self.num_experts)
        self.gamma = _checks.divisor("gamma", gamma, power=3)
        self.entropy_loss_weight = _checks.finite_number(
            "entropy_loss_weight", entropy_loss_weight
        )
        self.static = _checks.flag("static", static)
        self.experts = self.make_experts(self.num_experts, any_layer=True)
        # As in the authors' code: near 0, where the smooth step is steepest, and
        # random, to start selectors at different values.
        self._bit_initializer = keras.initializers.RandomUniform(
            -self.gamma / 100, self.gamma / 100
        )
        self._mixing_initializer = keras.initializers.RandomUniform(-0.05, 0.05)
        if not static:
            self.selectors = self._linear(
                "selectors", self.top_k * self.num_bits, self._bit_initializer
            )
        if not static and self.top_k > 1:
            # A single selector needs no mixing weights.
            self.mixing = self._linear("mixing", self.top_k, self._mixing_initializer)

    def _linear(self, name: str, units: int, initializer: Any) -> MLPExperts:
        """Return a layer (..., g) -> (..., t, units), one linear map per task."""
        return MLPExperts(
            self._tasks.count,
            units,
            kernel_initializer=initializer,
            bias_initializer=initializer,
            dtype=self.precise_dtype,
            name=name,
        )

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        gate_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        # A symbolic call builds experts of any kind if they are not built yet.
        symbolic = self.experts(keras.KerasTensor(inputs_shape, self.compute_dtype))
        check_expert_outputs(symbolic, (*inputs_shape[:-1], self.num_experts))
        if self.static:
            self._build_static()
            return
        self.selectors.build(gate_inputs_shape or inputs_shape)
        if self.top_k > 1:
            self.mixing.build(gate_inputs_shape or inputs_shape)

    def _build_static(self) -> None:
        self.selector_logits = self._add_static_logits(
            "selector_logits", (self.top_k, self.num_bits), self._bit_initializer
        )
        if self.top_k > 1:
            self.mixing_logits = self._add_static_logits(
                "mixing_logits", (self.top_k,), self._mixing_initializer
            )

    def _add_static_logits(
        self, name: str, shape: tuple[int, ...], initializer: Any
    ) -> Any:
        """Return the logits of static gates, a variable of shape (t, *shape)."""
        return self.add_weight(
            name=name,
            shape=(self._tasks.count, *shape),
            initializer=PerExpert(initializer),
            dtype=self.precise_dtype,
            autocast=False,
        )

    def call(
        self,
        inputs: Any,
        gate_inputs: Any = None,
        mask: Any = None,
        training: bool | None = None,
    ) -> dict[str, Any] | list[Any]:
        mask = given_or_attached(mask, inputs)
        weights, selected = self._gate(inputs, gate_inputs)
        self._add_losses(selected, None if self.static else mask)
        counts = [self.num_experts]
        return self._tasks.pack(
            self.mix_experts(weights, self.experts, [inputs], counts, training)
        )

    def gate_weights(self, inputs: Any, gate_inputs: Any = None) -> Any:
        """Return the gates, `(..., t, e)`.

        Each row sums to 1 if the number of experts is a power of two, else to at
        most 1.
        """
        self.ensure_built(inputs, gate_inputs)
        inputs = ops.convert_to_tensor(inputs)
        if gate_inputs is not None:
            gate_inputs = ops.convert_to_tensor(gate_inputs)
        weights, _ = self._gate(inputs, gate_inputs)
        leading = ops.shape(inputs)[:-1]
        return ops.broadcast_to(weights, (*leading, *weights.shape[-2:]))

    def _gate(self, inputs: Any, gate_inputs: Any) -> tuple[Any, Any]:
        """Return the weights (..., t, e) and the selectors (n, t, k, e).

        With `static`, both lack the leading axes.
        """
        if gate_inputs is not None and self.static:
            raise ValueError(
                "`gate_inputs` must be None with static=True. "
                f"Received: gate_inputs of shape {tuple(gate_inputs.shape)}"
            )
        if self.static:
            return self._mix(
                ops.convert_to_tensor(self.selector_logits),
                ops.convert_to_tensor(self.mixing_logits) if self.top_k > 1 else None,
            )
        if gate_inputs is None:
            gate_inputs = inputs
        else:
            gate_inputs = checked_rows("gate_inputs", gate_inputs, inputs)
        leading = ops.shape(gate_inputs)[:-1]
        rows = ops.reshape(gate_inputs, (-1, gate_inputs.shape[-1]))
        bits = (-1, self._tasks.count, self.top_k, self.num_bits)
        weights, selected = self._mix(
            ops.reshape(self.selectors(rows), bits),
            self.mixing(rows) if self.top_k > 1 else None,
        )
        shape = (*_backend.restored_axes(leading), self._tasks.count, self.num_experts)
        return ops.reshape(weights, shape), selected

    def _mix(self, selector_logits: Any, mixing_logits: Any) -> tuple[Any, Any]:
        """(..., t, k, m), (..., t, k) -> (..., t, e) weights, (..., t, k, e)."""
        selected = _selected(smooth_step(selector_logits, self.gamma), self.num_experts)
        if mixing_logits is None:
            return ops.squeeze(selected, axis=-2), selected
        shares = ops.expand_dims(ops.softmax(mixing_logits, axis=-1), -1)
        return ops.sum(shares * selected, axis=-2), selected

    def _add_losses(self, selected: Any, mask: Any) -> None:
        """Add the losses of the selectors, summed over the selectors of a row."""
        per_row = self._tasks.count * self.top_k
        rows = ops.reshape(selected, (-1, self.num_experts))
        if mask is not None:
            mask = ops.reshape(ops.cast(mask, "bool"), (-1,))
            mask = ops.repeat(mask, per_row)
        if self.entropy_loss_weight != 0.0:
            entropy = losses.entropy_loss(rows, mask)
            self.add_loss(self.entropy_loss_weight * per_row * entropy)
        if self.num_experts < 2**self.num_bits:
            self.add_loss(per_row * _unreachable_loss(rows, mask))

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        gate_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> Any:
        units = self.output_units(self.experts, inputs_shape[-1])
        return self._tasks.repeat((*inputs_shape[:-1], units))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "gamma": self.gamma,
            "entropy_loss_weight": self.entropy_loss_weight,
            "static": self.static,
        }


def smooth_step(values: Any, gamma: float = 1.0) -> Any:
    """Return S: 0 below -gamma / 2, 1 above gamma / 2, a smooth cubic between.

    The cubic is -2 (x / gamma)^3 + 3/2 (x / gamma) + 1/2 (Hazimeh et al. 2020).
    """
    # Clipping first makes the ends exactly 0 and 1 in floating point.
    x = ops.clip(values / gamma, -0.5, 0.5)
    return (1.5 - 2.0 * x * x) * x + 0.5


def _selected(bits: Any, num_experts: int) -> Any:
    """(..., m) -> (..., e): r(z), the selector's weight of each expert.

    The first bit is the most significant. Each step doubles the number of indices,
    which takes 2e products instead of e * m.
    """
    selected = ops.ones_like(bits[..., :1])
    for j in reversed(range(bits.shape[-1])):
        bit = bits[..., j : j + 1]
        selected = ops.concatenate([selected * (1.0 - bit), selected * bit], axis=-1)
    return selected[..., :num_experts]


def _unreachable_loss(rows: Any, mask: Any) -> Any:
    """Return the mean of 1 / sum_i r(z)_i - 1 over the rows (n * t * k, e)."""
    reached = ops.sum(rows, axis=-1)
    # The floor avoids a division by 0; below it the gradient is 0.
    values = 1.0 / ops.maximum(reached, 1e-6) - 1.0
    if mask is None:
        count = ops.cast(ops.shape(values)[0], values.dtype)
    else:
        values = ops.where(mask, values, ops.zeros_like(values))
        count = ops.sum(ops.cast(mask, values.dtype))
    return ops.sum(values) / ops.maximum(count, 1.0)


def _checked_num_experts(num_experts: Any) -> int:
    if _checks.positive_int("num_experts", num_experts) < 2:
        raise ValueError(
            "`num_experts` must be >= 2 in DSelectK. "
            f"Received: num_experts={num_experts}"
        )
    return int(num_experts)
