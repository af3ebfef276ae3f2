"""Multi-task mixtures of experts, with one gate per task or one for all tasks.

Axis letters: n rows, d input features, e experts, t tasks, u expert output units.

With experts f_k and gates g_t (Ma et al. 2018, equations 6 and 7):
y_t = sum_k g_t(x)_k f_k(x),  g_t(x) = softmax(W_t x).

A joint budget of experts (Zhang et al. 2026) keeps, with p_t the softmax above,
S = the s experts with the largest sum_t p_t(x)_k,  the same for all tasks,
P_t = the k largest of p_t(x) outside of S,
and g_t(x) is p_t(x) restricted to the union of S and P_t, renormalized. At most
s + t k experts are computed for a row, and s of them serve every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, losses
from keras_moe import dispatch as dispatch_lib
from keras_moe import routing as routing_lib
from keras_moe._layer import given_or_attached
from keras_moe.layers._mixture import GatedMixture
from keras_moe.layers._parts import (
    HasDispatch,
    check_expert_outputs,
    check_leading_axes,
    checked_rows,
    expert_count,
    layer_name,
)

# Keeps the old import path.
from keras_moe.layers.shared_bottom import SharedBottom as SharedBottom


@keras.saving.register_keras_serializable("keras_moe")
class MMoE(HasDispatch, GatedMixture):
    """Multi-gate Mixture-of-Experts: shared experts with one gate per task.

    Every task has its own softmax gate over the shared experts, so related tasks can
    use the same experts and conflicting tasks different ones. `PLE` without task
    experts is the version with several levels.

    Args:
        num_experts: int, number of shared experts e. Default: that of `experts`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        top_k: int, if given, each gate keeps its k largest weights and renormalizes
            them. With k = 1 the weight is not renormalized: it would always be 1 and
            have no gradient. Only experts chosen by at least one gate of a row are
            computed, once each, so the cost falls with k. With `shared_top_k`, the
            number of experts that a task chooses beside the shared ones; may be 0.
        shared_top_k: int, if given, all tasks together choose so many experts s for a
            row, those with the largest sum of gate probabilities over the tasks. Each
            task weights them by its own gate, and adds its `top_k` best others. A row
            then needs at most s + t k experts (equations at the top of the module).
        load_balancing_loss_weight: float, weight of the load balancing loss over the
            union of the tasks' choices,
            `keras_moe.losses.multi_gate_load_balancing_loss`. Needs `top_k`.
        dispatch: how rows are sent to experts with `top_k`: "dense" (every expert on
            every row), "split" (chosen experts only; not for XLA), "blocked" (the same
            for XLA), "ragged" (the same for JAX: grouped matmuls in programs for a
            TPU), or "auto": "dense" if random gates would leave less than a quarter of
            the experts unused by a row, else the first of the others that the backend
            and compiler support. The result is the same.
        gate_units: sequence of ints, hidden layers of the gates. By default a gate
            is linear, as in the paper.
        gate_temperature: float >= 1.1e-19 (1.5e-154 for a float64 layer), which keeps
            quotients finite; divisor of the gate logits: below 1 makes the gates
            sharper, above 1 smoother.
        gate_dropout: float in [0, 1), the probability of dropping an expert from a
            gate in training. The remaining weights are renormalized; if all would be
            dropped, none is. It reduces the polarization of gates on few experts
            (Zhao et al. 2019, section 4.4).
        experts: a layer that maps `(..., d)` to `(..., e, u)` and that no other layer
            uses, instead of the default `MLPExperts`. The expert arguments (from
            `activation` to `kernel_regularizer`) are then ignored.
        activation: activation of every expert layer, the last one included.
        use_bias: bool, whether the expert layers add a bias.
        dropout: float in [0, 1), fraction of an expert's hidden units to drop.
        kernel_initializer: initializer of one expert's kernel.
        kernel_regularizer: regularizer of the stacked expert kernels.
        gate_use_bias: bool, whether the gate layers add a bias.
        gate_kernel_initializer: initializer of one gate's kernel.
        seed: int, the seed of both kinds of dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`, usually `(batch, d)`.
        gate_inputs: tensor of shape `(..., g)` with the leading axes of `inputs`,
            the inputs of the gates. Default: `inputs`.
        training: bool, whether dropout is active.
        mask: bool tensor of the leading axes, False for rows to exclude from the
            load balancing loss.

    Returns:
        One tensor of shape `(..., u)` for each task: a dict by task name if `tasks`
        is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid, if the leading axes of
            `gate_inputs` are not those of `inputs`, or if `experts` gives outputs of
            another shape.

    Example:

    >>> mmoe = keras_moe.layers.MMoE(
    ...     num_experts=4, expert_units=(32, 16), tasks=["click", "buy"]
    ... )
    >>> outputs = mmoe(np.ones((2, 8)))
    >>> sorted(outputs), outputs["buy"].shape == (2, 16)
    (['buy', 'click'], True)

    Gates are computed in float32 under any dtype policy, then cast once.

    `shared_top_k` is the expert selection of SMES. Here every task counts the same in
    the joint choice, weights are renormalized over a task's shared and private experts,
    and a single one keeps its probability (`shared_top_k=1, top_k=0`), as with
    `top_k=1`. The loss is not scaled by the number of experts chosen.

    References:
        - [Ma et al., 2018: Modeling Task Relationships in Multi-task Learning with
          Multi-gate Mixture-of-Experts](https://doi.org/10.1145/3219819.3220007)
        - [Zhao et al., 2019: Recommending What Video to Watch Next: A Multitask
          Ranking System](https://doi.org/10.1145/3298689.3346997)
        - [Zhang et al., 2026: SMES: Towards Scalable Multi-Task Recommendation via
          Expert Sparsity](https://arxiv.org/abs/2602.09386)
    """

    def __init__(
        self,
        num_experts: int | None = None,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        shared_top_k: int | None = None,
        dispatch: str = "auto",
        load_balancing_loss_weight: float = 0.0,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(expert_units, tasks, name=layer_name(name, "mmoe"), **kwargs)
        self.num_experts = expert_count(num_experts, self._experts_given)
        self.top_k, self.shared_top_k = _checked_choices(
            top_k, shared_top_k, self.num_experts
        )
        self.load_balancing_loss_weight = _checks.non_negative_number(
            "load_balancing_loss_weight", load_balancing_loss_weight
        )
        if self.load_balancing_loss_weight and self.top_k is None:
            raise ValueError(
                "`load_balancing_loss_weight` must be 0 with top_k=None: every expert "
                "is computed for every row. Received: "
                f"load_balancing_loss_weight={load_balancing_loss_weight!r}"
            )
        self.experts = self.make_experts(self.num_experts, any_layer=True)
        self.gates = self.make_gates(self.num_gates, self.num_experts)
        self.dispatch = dispatch

    def _check_dispatch(self, name: str) -> None:
        _checks.one_of("dispatch", name, ("auto", "dense", *dispatch_lib.DROPLESS))
        if name not in dispatch_lib.DROPLESS:
            return
        if self.top_k is None:
            raise ValueError(
                '`dispatch` must be "dense" or "auto" with top_k=None. Received: '
                f"dispatch={name!r}"
            )
        dispatch_lib.check_serves(name, self.experts)

    @property
    def num_gates(self) -> int:
        """One gate for each task."""
        return self._tasks.count

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        gate_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        check_leading_axes("gate_inputs", gate_inputs_shape, inputs_shape)
        # A symbolic call builds experts of any kind if they are not built yet.
        symbolic = self.experts(keras.KerasTensor(inputs_shape, self.compute_dtype))
        check_expert_outputs(symbolic, (*inputs_shape[:-1], self.num_experts))
        self.gates.build(gate_inputs_shape or inputs_shape)

    def call(
        self,
        inputs: Any,
        gate_inputs: Any = None,
        training: bool | None = None,
        mask: Any = None,
    ) -> dict[str, Any] | list[Any]:
        if gate_inputs is None:
            gate_inputs = inputs
        else:
            gate_inputs = checked_rows("gate_inputs", gate_inputs, inputs)
        logits = self.gate_logits(self.gates, gate_inputs)
        gates = self._gates_of(logits, training)  # (..., g, e)
        if self.load_balancing_loss_weight:
            self._add_balance_loss(logits, gates, given_or_attached(mask, inputs))
        dispatch = self._resolve_dispatch()
        if dispatch == "dense":
            counts = [self.num_experts]
            mixtures = self.mix_experts(gates, self.experts, [inputs], counts, training)
        else:
            mixed = self._mix_chosen(inputs, gates, dispatch, training)
            mixtures = list(ops.unstack(mixed, axis=-2))
        return self._outputs(mixtures)

    def _outputs(self, mixtures: list[Any]) -> dict[str, Any] | list[Any]:
        """Return the mixture of each task's gate."""
        return self._tasks.pack(mixtures)

    def gate_weights(self, inputs: Any, gate_inputs: Any = None) -> Any:
        """Return the gates in inference, `(..., g, e)`.

        Each row sums to 1, except with one choice, such as `top_k=1`, whose weight is
        kept as it is.
        """
        self.ensure_built(inputs, gate_inputs)
        inputs = ops.convert_to_tensor(inputs if gate_inputs is None else gate_inputs)
        return self._gate(inputs, training=False)

    def _gate(self, inputs: Any, training: bool | None) -> Any:
        return self._gates_of(self.gate_logits(self.gates, inputs), training)

    def _gates_of(self, logits: Any, training: bool | None) -> Any:
        shared = self.shared_top_k or 0
        return self.gate_probabilities(logits, training, self.top_k, shared)

    def _add_balance_loss(self, logits: Any, gates: Any, mask: Any) -> None:
        """Add the loss over the union; its probabilities are those without dropout."""
        shape = (-1, self.num_gates, self.num_experts)
        probs = self.gate_probabilities(logits, training=False)
        if mask is not None:
            mask = ops.reshape(ops.cast(mask, "bool"), (-1,))
        loss = losses.multi_gate_load_balancing_loss(
            ops.reshape(probs, shape), ops.reshape(gates, shape), mask
        )
        self.add_loss(self.load_balancing_loss_weight * loss)

    def _resolve_dispatch(self) -> str:
        """Return the dispatch for this graph, by the rule in the class docstring."""
        if self.dispatch != "auto":
            return self.dispatch
        if self.top_k is None or not hasattr(self.experts, "on_pieces"):
            return "dense"
        # Expected fraction of experts that no gate of a row chooses, for random gates.
        others = self.num_experts - (self.shared_top_k or 0)
        idle = 0.0
        if others:
            idle = others / self.num_experts
            idle *= (1 - self.top_k / others) ** self.num_gates
        return dispatch_lib.dropless_here(self.experts) if idle >= 0.25 else "dense"

    def _max_chosen(self) -> int:
        """Return the maximum number of experts chosen by the gates of one row."""
        chosen = (self.shared_top_k or 0) + self.num_gates * (self.top_k or 0)
        return min(chosen, self.num_experts)

    def _mix_chosen(
        self, inputs: Any, gates: Any, dispatch: str, training: bool | None
    ) -> Any:
        """(..., d), (..., g, e) -> (..., g, u), computing each chosen expert once."""
        leading = ops.shape(inputs)[:-1]
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        gates = ops.reshape(gates, (-1, self.num_gates, self.num_experts))
        routing, weights = routing_lib.union(gates, self._max_chosen())
        compute = getattr(dispatch_lib, dispatch)
        outputs = dispatch_lib.on_devices(  # (n, k, u)
            compute, tokens, routing, self.experts, training
        )
        mixtures = self.mix(weights, outputs)
        return ops.reshape(
            mixtures,
            (*_backend.restored_axes(leading), self.num_gates, mixtures.shape[-1]),
        )

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
            "shared_top_k": self.shared_top_k,
            "dispatch": self.dispatch,
            "load_balancing_loss_weight": self.load_balancing_loss_weight,
        }


@keras.saving.register_keras_serializable("keras_moe")
class OMoE(MMoE):
    """One-gate Mixture-of-Experts: all tasks share the experts and the gate.

    The mixture is the same for every task. It is the baseline for measuring the effect
    of the task gates of `MMoE`.

    Args:
        num_experts: int, number of shared experts e. Default: that of `experts`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        tasks: a sequence of task names (the outputs are a dict by name) or a number
            of tasks (the outputs are a list).
        **kwargs: further arguments of `MMoE`.

    Call arguments:
        inputs: tensor of shape `(..., d)`; further ones as in `MMoE`.

    Returns:
        The same tensor of shape `(..., u)` for each task: a dict by task name if
        `tasks` is a sequence of names, a list if it is a number.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> omoe = keras_moe.layers.OMoE(
    ...     num_experts=4, expert_units=(32, 16), tasks=["click", "buy"]
    ... )
    >>> omoe(np.ones((2, 8)))["buy"].shape == (2, 16)
    True

    References:
        - [Ma et al., 2018: Modeling Task Relationships in Multi-task Learning with
          Multi-gate Mixture-of-Experts, section 4.1](
          https://doi.org/10.1145/3219819.3220007)
    """

    def __init__(
        self,
        num_experts: int | None = None,
        expert_units: int | Sequence[int] | None = None,
        tasks: int | Sequence[str] | None = None,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_experts,
            expert_units,
            tasks,
            name=layer_name(name, "omoe"),
            **kwargs,
        )

    @property
    def num_gates(self) -> int:
        """One gate for all tasks."""
        return 1

    def _outputs(self, mixtures: list[Any]) -> dict[str, Any] | list[Any]:
        return self._tasks.repeat(mixtures[0])


def _checked_choices(
    top_k: Any, shared_top_k: Any, num_experts: int
) -> tuple[int | None, int | None]:
    """Return `top_k` and `shared_top_k`, which may not exceed all experts together."""
    if shared_top_k is None:
        checked = None if top_k is None else _checks.top_k(top_k, num_experts)
        return checked, None
    shared = _checks.positive_int("shared_top_k", shared_top_k)
    if top_k is None:
        raise ValueError(
            "`top_k` must be given with `shared_top_k`: the number of experts, maybe "
            "0, that a task chooses beside the shared ones. "
            f"Received: shared_top_k={shared_top_k}, top_k=None"
        )
    private = _checks.count("top_k", top_k)
    if shared + private > num_experts:
        raise ValueError(
            "`shared_top_k` + `top_k` must not exceed `num_experts`. Received: "
            f"shared_top_k={shared_top_k}, top_k={top_k}, num_experts={num_experts}"
        )
    return private, shared
