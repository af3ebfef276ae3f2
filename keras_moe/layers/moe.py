"""Sparse mixture of experts: route, dispatch, combine.

Axis letters: n tokens, d input features, e experts, k choices per token, u output
units.

y_i = sum over the k experts that the router chose for token i of w_ik f_k(x_i)
(Shazeer et al. 2017, equation 1), plus the shared experts, applied to every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, losses
from keras_moe import dispatch as dispatch_lib
from keras_moe import routing as routing_lib
from keras_moe.layers import _moe_inputs as flat
from keras_moe.layers import _moe_parts as parts
from keras_moe.layers._mlp_layer import MLPLayer
from keras_moe.layers._parts import (
    HasDispatch,
    check_experts,
    checked_expert_units,
    deserialized,
    expert_count,
    layer_name,
    serialized,
)


@keras.saving.register_keras_serializable("keras_moe")
class MoE(HasDispatch, MLPLayer):
    """Sparse Mixture-of-Experts: a router sends each token to a few experts.

    The layer has the parameters of all experts and the cost of `top_k` of them. It can
    replace a `Dense` layer or an MLP.

    Args:
        num_experts: int, number of experts e. Default: that of `experts` or `router`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        top_k: int, number of experts per token, k. None: `router.top_k` if `router` is
            an object, else 2 (1 if there is a single expert).
        activation: activation of the hidden layers of an expert; its last layer is
            linear.
        router: a name from `keras_moe.routers.KNOWN`, or a router object that no other
            layer uses. Default: `TopKRouter`.
        experts: a layer of `keras_moe.experts` that no other layer uses, instead of
            the default `MLPExperts`.
            The expert arguments (`activation`, and from `use_bias` to
            `kernel_regularizer`) are then ignored.
        dispatch: how tokens are sent to experts. All give the same result at different
            cost, except that "capacity" may drop choices:

            - "auto": "capacity" if `capacity_factor` is given or the router is
              expert-choice; "dense" if every token goes to every expert; else
              "ragged" under JAX and "blocked" under XLA (`jit_compile=True`) or on a
              GPU with JAX (but "dense" for `LayerExperts`), and "split" otherwise.
              Works with and without XLA and in exports.
            - "split": experts compute exactly their rows, with data-dependent shapes.
              Not for XLA; on a GPU it copies the row counts to the host.
            - "blocked": the same rows in blocks of static size, for XLA.
            - "ragged": the same rows. Programs for a TPU use grouped matmuls, forward
              and backward, also if they are compiled on another host; other programs
              use blocks in turn. Only for JAX.
            - "capacity": every expert takes at most `ceil(capacity_factor * k * n / e)`
              choices (the default factor is 1.25). Choices above that are dropped and
              contribute zero. Padding takes no slot but counts in n.
            - "dense": every expert on every token. Required by dense routers.
        capacity_factor: float > 0, see "capacity".
        priority: "position" or "probability", which choices an expert keeps when it is
            full (see `keras_moe.routing.capacity_slots`). Only with a capacity.
        num_shared_experts: int, number of experts of the same shape that are applied to
            every token; their outputs are added.
        load_balancing_loss_weight: float, weight of
            `keras_moe.losses.load_balancing_loss`. None: the router's default, 0.01
            for "top_k".
        router_z_loss_weight: float, weight of `router_z_loss`.
        importance_loss_weight: float, weight of `importance_loss`. None: the
            router's default, 0.1 for "noisy_top_k".
        load_loss_weight: float, weight of `load_loss`, for routers with noise. None:
            the router's default, 0.1 for "noisy_top_k".
        entropy_loss_weight: float, weight of `entropy_loss`.
        routing_metrics: sequence of names from "expert_load", "load_cv",
            "dropped_fraction", "router_entropy" and "router_confidence", which `fit`
            reports (see `keras_moe.metrics.RoutingMetrics`). Calls with a `training`
            argument update them: `fit`, `evaluate` and `predict`. Exports leave them
            out, except `model.export` of a subclassed model whose `call` has the
            default `training=False`: use `training=None`.
        use_bias: bool, whether the expert layers add a bias.
        dropout: float in [0, 1), fraction of an expert's hidden units to drop.
        kernel_initializer: initializer of one expert's kernel.
        kernel_regularizer: regularizer of the stacked expert kernels.
        seed: int, the seed of dropout and of a router's noise.

    Call arguments:
        inputs: tensor of shape `(..., d)`. The leading axes are flattened to tokens.
        mask: bool tensor of the leading axes, False for padding, which is not routed,
            is excluded from losses and capacity slots, and has outputs of zero.
        router_inputs: inputs of the router, with the leading axes of `inputs`; for the
            router "hash", integer ids with the shape of the leading axes. Default:
            `inputs`.
        training: bool, whether dropout and noise are active.

    Returns:
        A tensor of shape `(..., u)`.

    Raises:
        ValueError: if an argument is invalid, or if router, experts and dispatch are
            incompatible.

    Example:

    >>> moe = keras_moe.layers.MoE(num_experts=8, expert_units=(32, 16), top_k=2)
    >>> moe(np.ones((4, 16))).shape == (4, 16)
    True

    The router computes in float32 under any dtype policy; the weights are cast once.

    `keras.remat` recomputes the layer with the same routing if its router draws no
    noise. Keras 3.15 has four limits there: on TensorFlow, losses added inside get no
    gradient, and a step in graph mode sometimes has other gradients (about 1 of 60
    short runs, also of plain Dense layers; `run_eagerly=True` avoids it); on JAX,
    losses and other state raise an error; dropout is drawn again. A "bias_balanced"
    router needs no loss.

    NaN and infinity affect only the row of their token. Where tokens compete for slots
    (capacity, expert choice, Sinkhorn in training), such a token counts as padding and
    takes no slot.

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks](
          https://arxiv.org/abs/1701.06538)
        - [Fedus et al., 2021: Switch Transformers](https://arxiv.org/abs/2101.03961)
        - [Gale et al., 2022: MegaBlocks](https://arxiv.org/abs/2211.15841)
    """

    def __init__(
        self,
        num_experts: int | None = None,
        expert_units: int | Sequence[int] | None = None,
        top_k: int | None = None,
        *,
        router: Any = None,
        experts: keras.layers.Layer | None = None,
        dispatch: str = "auto",
        capacity_factor: float | None = None,
        priority: str = "position",
        num_shared_experts: int = 0,
        load_balancing_loss_weight: float | None = None,
        router_z_loss_weight: float = 0.0,
        importance_loss_weight: float | None = None,
        load_loss_weight: float | None = None,
        entropy_loss_weight: float = 0.0,
        routing_metrics: Sequence[str] = (),
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=layer_name(name, "moe"), **kwargs)
        self.num_experts = expert_count(num_experts, experts, router)
        self.expert_units = checked_expert_units(expert_units)
        self.priority = _checks.one_of(
            "priority", priority, ("position", "probability")
        )
        self._router_given = router
        self._experts_given = experts
        self._top_k_given = top_k
        if top_k is not None:
            self._top_k_given = _checks.top_k(top_k, self.num_experts)
        self.router = parts.make_router(
            router,
            self.num_experts,
            top_k,
            capacity_factor,
            self.seed,
            self.dtype_policy,
        )
        self.top_k = self.router.top_k
        self.experts = self._make_experts()
        num_shared = _checks.count("num_shared_experts", num_shared_experts)
        self.num_shared_experts = num_shared
        self.shared_experts = parts.make_shared_experts(self.experts, num_shared)
        self._capacity_factor = _checked_factor(capacity_factor)
        self.dispatch = dispatch
        self.loss_weights = parts.checked_loss_weights(
            self.router,
            load_balancing=load_balancing_loss_weight,
            router_z=router_z_loss_weight,
            importance=importance_loss_weight,
            load=load_loss_weight,
            entropy=entropy_loss_weight,
        )
        self.routing_metrics = parts.make_metrics(routing_metrics, self.router, self)
        metrics = self.routing_metrics
        self._metric_names = [] if metrics is None else list(metrics.show)

    def _make_experts(self) -> keras.layers.Layer:
        check_experts(self._experts_given, self.num_experts, self.expert_units)
        if self._experts_given is not None:
            return self._experts_given
        return self.make_mlps(self.num_experts, self.expert_units, name="experts")

    @property
    def capacity_factor(self) -> float | None:
        """Slots per expert, as a multiple of the load at perfect balance.

        Can be changed like `dispatch`, which determines whether there is a capacity.
        With an expert-choice router that the layer has made, it is the router's factor.
        """
        if self._router_takes_factor:
            return self.router.capacity_factor
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        factor = _checked_factor(factor)
        if not self._router_takes_factor:
            self._capacity_factor = factor
        elif factor is not None:
            self.router.capacity_factor = factor

    @property
    def _router_takes_factor(self) -> bool:
        return self.router.choice == "expert" and self._router_given is not self.router

    def _check_dispatch(self, name: str) -> None:
        factor, router = self.capacity_factor, self.router
        parts.check_dispatch(name, router, self.experts)
        parts.check_capacity_factor(factor, name, router, self._router_given is router)
        parts.check_priority(self.priority, name, factor, router)

    def _has_capacity(self) -> bool:
        has_factor = self.capacity_factor is not None
        return self.dispatch == "capacity" or (self.dispatch == "auto" and has_factor)

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        router_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        tokens = keras.KerasTensor((None, features), self.compute_dtype)
        for experts in (self.experts, self.shared_experts):
            if experts is not None:
                experts(tokens)  # A symbolic call builds experts of any kind.
        if not self.router.built:
            shapes = inputs_shape, router_inputs_shape
            self.router.build(flat.router_shape(self.router, *shapes))

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool | None = None,
        router_inputs: Any = None,
    ) -> Any:
        leading = ops.shape(inputs)[:-1]
        tokens, mask, routing = self._route(inputs, mask, training, router_inputs)
        outputs = self._compute(tokens, routing, training)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens, training=training)
            outputs = outputs + ops.sum(shared, axis=1)

        self._add_losses(routing, training)
        if mask is not None:
            outputs = routing_lib.rows_where(mask, outputs)
        return ops.reshape(
            outputs, (*_backend.restored_axes(leading), outputs.shape[-1])
        )

    def _route(self, inputs: Any, mask: Any, training: Any, router_inputs: Any) -> Any:
        """Return the tokens (n, d), their mask, and the record of the router."""
        tokens, mask = flat.tokens(inputs, mask)
        routed = tokens
        if router_inputs is not None:
            routed = flat.router_inputs(router_inputs, inputs)
        return tokens, mask, self.router(routed, mask=mask, training=training)

    def route(
        self, inputs: Any, mask: Any = None, router_inputs: Any = None
    ) -> tuple[Any, Any]:
        """Return how the layer routes in inference: the record, and what is kept.

        The record is of `keras_moe.routing`. What is kept is bool `(n, k)`, False for
        choices that a capacity drops; None without a capacity.
        """
        if not self.built:
            self(inputs, router_inputs=router_inputs)
        inputs = ops.convert_to_tensor(inputs)
        tokens, _, routing = self._route(inputs, mask, False, router_inputs)
        if self._resolve_dispatch() != "capacity" or self.router.choice != "token":
            return routing, None
        slots, _ = dispatch_lib.slots_within_capacity(
            *(tokens, routing, self.num_experts),
            capacity_factor=self.capacity_factor,
            priority=self.priority,
        )
        return routing, slots.kept

    def _compute(self, tokens: Any, routing: Any, training: bool | None) -> Any:
        """(n, d) -> (n, u): apply the experts of each token."""
        name, kept = self._resolve_dispatch(), None
        if name == "capacity" and self.router.choice == "token":
            outputs, kept = dispatch_lib.on_devices(
                dispatch_lib.within_capacity,
                *(tokens, routing, self.experts, training),
                capacity_factor=self.capacity_factor,
                priority=self.priority,
            )
        else:
            compute = getattr(dispatch_lib, name)
            if name == "capacity":
                compute = dispatch_lib.expert_choice
            outputs = dispatch_lib.on_devices(
                compute, tokens, routing, self.experts, training
            )
        # `fit` and `evaluate` set `training`; an export does not, and has no metrics.
        if self.routing_metrics is not None and training is not None:
            self.routing_metrics.update_state(routing, kept)
        return ops.cast(outputs, self.compute_dtype)

    def _resolve_dispatch(self) -> str:
        """Return the dispatch for this graph, by the rule in the class docstring."""
        if self.dispatch != "auto":
            return self.dispatch
        if self.router.choice == "expert" or self.capacity_factor is not None:
            return "capacity"
        if self.router.choice == "all" or self.top_k == self.num_experts:
            return "dense"
        return dispatch_lib.dropless_here(self.experts)

    def _add_losses(self, routing: Any, training: bool | None) -> None:
        """Add the weighted auxiliary losses."""
        weights = dict(self.loss_weights)
        if not training:
            weights.pop("load", None)  # Without noise the load has no gradient.
        for loss in losses.auxiliary_losses(routing, weights).values():
            self.add_loss(loss)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return mask

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        router_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> tuple[int | None, ...]:
        tokens = keras.KerasTensor((None, inputs_shape[-1]), self.compute_dtype)
        units = self.experts.compute_output_spec(tokens).shape[-1]
        return (*inputs_shape[:-1], units)

    def get_config(self) -> dict[str, Any]:
        router = self._router_given
        if isinstance(router, keras.layers.Layer):
            router = serialized(router)
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "expert_units": self.expert_units,
            "top_k": self._top_k_given,
            "router": router,
            "experts": serialized(self._experts_given),
            "dispatch": self.dispatch,
            # Without an effect they would be refused, as in `__init__`.
            "capacity_factor": self.capacity_factor if self._has_capacity() else None,
            "priority": self.priority if self._has_capacity() else "position",
            "num_shared_experts": self.num_shared_experts,
            **{
                f"{name}_loss_weight": self.loss_weights.get(name, 0.0)
                for name in ("load_balancing", "router_z", "importance", "load")
            },
            "entropy_loss_weight": self.loss_weights.get("entropy", 0.0),
            "routing_metrics": self._metric_names,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoE:
        made = {part: deserialized(config.get(part)) for part in ("router", "experts")}
        # A subclass may have fixed one of them.
        return cls(**{**config, **{k: v for k, v in made.items() if k in config}})


def _checked_factor(factor: Any) -> float | None:
    return (
        None if factor is None else _checks.positive_number("capacity_factor", factor)
    )
