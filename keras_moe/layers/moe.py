"""The sparse mixture of experts: route, dispatch, combine.

Axis letters: n tokens, d input features, e experts, k choices a token, u output units.

y_i = sum over the k experts that the router chose for token i of w_ik f_k(x_i)
(Shazeer et al. 2017, equation 1), plus the shared experts, which see every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, losses
from keras_moe import dispatch as dispatch_lib
from keras_moe import routing as routing_lib
from keras_moe._layer import Layer
from keras_moe.experts import MLPExperts
from keras_moe.layers import _moe_inputs as flat
from keras_moe.layers import _moe_parts as parts
from keras_moe.layers._parts import check_experts, default_name


@keras.saving.register_keras_serializable("keras_moe")
class MoE(Layer):
    """Sparse Mixture-of-Experts: each token is computed by the few experts it chooses.

    The layer has as many parameters as all its experts, and costs what `top_k` of them
    cost. It takes the place of a `Dense` layer or of an MLP.

    Args:
        num_experts: int, number of experts e.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        top_k: int, number of experts that compute a token, k. None: that of `router`
            where it is an object, else 2 (1 of a single expert).
        activation: activation of the hidden layers of an expert; its last layer is
            linear.
        router: a name out of `keras_moe.routers.KNOWN`, or a router of this layer's
            own. `TopKRouter` by default.
        experts: a layer of `keras_moe.experts`, instead of the default `MLPExperts`.
            The arguments that describe experts (`activation`, and from `use_bias` to
            `kernel_regularizer`) then have no effect.
        dispatch: how tokens come to their experts. The result is the same, the cost is
            not:

            - "auto": "capacity" if `capacity_factor` is given or the router is an
              expert choice; "dense" if every token goes to every expert; else
              "blocked" where XLA compiles (`jit_compile=True`, JAX; but "dense" for
              `LayerExperts`), "ragged" on a TPU under JAX, and "split" everywhere
              else. The layer decides anew for
              every graph, so one model trains compiled or not, and exports.
            - "split": exactly the rows chosen. Not for XLA; on a GPU it reads on the
              host how many rows each expert has.
            - "blocked": the same in blocks of static size, for XLA.
            - "ragged": the same by `jax.lax.ragged_dot`. Only for JAX.
            - "capacity": every expert takes `ceil(capacity_factor * k * n / e)`
              choices of the n tokens (1.25 by default) and drops what comes later,
              which then contributes zero. Padding takes no slot but counts in n.
            - "dense": every expert on every token. What dense gates need.
        capacity_factor: float > 0, see "capacity".
        priority: "position" or "probability", who comes first when an expert is full
            (see `keras_moe.routing.capacity_slots`). Only where one can be.
        num_shared_experts: int, experts of the same shape that every token passes; the
            outputs are added.
        load_balancing_loss_weight: float, weight of `keras_moe.losses`'
            `load_balancing_loss`. None: what the router suggests, 0.01 for "top_k".
        router_z_loss_weight: float, weight of `router_z_loss`.
        importance_loss_weight: float, weight of `importance_loss`. None: what the
            router suggests, 0.1 for "noisy_top_k".
        load_loss_weight: float, weight of `load_loss`, for routers with noise. None:
            what the router suggests, 0.1 for "noisy_top_k".
        entropy_loss_weight: float, weight of `entropy_loss`.
        routing_metrics: sequence of names out of "expert_load", "load_cv",
            "dropped_fraction", "router_entropy" and "router_confidence", which `fit`
            then shows (see `keras_moe.metrics.RoutingMetrics`). They count in every
            call, also in one of an exported model: export a layer without them.
        use_bias: bool, whether the expert layers add a bias.
        dropout: float in [0, 1), dropped share of an expert's hidden units.
        kernel_initializer: initializer of one expert's kernel.
        kernel_regularizer: regularizer of the stacked expert kernels.
        seed: int, the seed of dropout and of a router's noise.

    Call arguments:
        inputs: tensor of shape `(..., d)`. The leading axes are flattened to tokens.
        mask: bool tensor of the leading axes, False for padding: not routed, without
            part in losses and capacity, and with zeros as outputs.
        router_inputs: what the router sees, with the leading axes of `inputs`; for
            the router "hash" the integer ids that it hashes, of the shape of the
            leading axes. `inputs` by default.
        training: bool, whether dropout and noise are active.

    Returns:
        A tensor of shape `(..., u)`.

    Raises:
        ValueError: if an argument breaks its rule, or if router, experts and dispatch
            do not go together.

    Example:

    >>> moe = keras_moe.layers.MoE(num_experts=8, expert_units=(32, 16), top_k=2)
    >>> moe(np.ones((4, 16))).shape == (4, 16)
    True

    The router computes in float32 under any dtype policy; the weights are cast once.

    `keras.remat` recomputes the layer with the same choices where its router draws no
    noise. Three limits there are those of Keras: on TensorFlow losses that are added
    inside get no gradient, on JAX they and other state are refused, and dropout is
    drawn anew. A "bias_balanced" router needs no loss.

    NaN and infinity stay in the row of their token. Where tokens compete for places (a
    capacity, an expert choice, Sinkhorn in training) it counts as padding, and others
    may have the place that it would take.

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks](
          https://arxiv.org/abs/1701.06538)
        - [Fedus et al., 2021: Switch Transformers](https://arxiv.org/abs/2101.03961)
        - [Gale et al., 2022: MegaBlocks](https://arxiv.org/abs/2211.15841)
    """

    def __init__(
        self,
        num_experts: int,
        expert_units: int | Sequence[int] | None = None,
        top_k: int | None = None,
        *,
        activation: Any = "relu",
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
        use_bias: bool = True,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name or default_name("moe"), **kwargs)
        self.supports_masking = True
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.expert_units = expert_units
        self.activation = keras.activations.get(activation)
        self.priority = _checks.one_of(
            "priority", priority, ("position", "probability")
        )
        self.use_bias = use_bias
        self.dropout = _checks.rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed = seed
        self._router_given = router
        self._experts_given = experts
        self._top_k_given = top_k
        if top_k is not None:
            _checks.top_k(top_k, self.num_experts)
        self.router = parts.make_router(
            router, self.num_experts, top_k, capacity_factor, seed, self.dtype_policy
        )
        self.top_k = self.router.top_k
        self.experts = self._make_experts()
        num_shared = _checks.count("num_shared_experts", num_shared_experts)
        self.num_shared_experts = num_shared
        self.shared_experts = parts.make_shared_experts(self.experts, num_shared)
        self.capacity_factor = capacity_factor
        self.dispatch = dispatch
        self.loss_weights = parts.checked_loss_weights(
            self.router,
            load_balancing=load_balancing_loss_weight,
            router_z=router_z_loss_weight,
            importance=importance_loss_weight,
            load=load_loss_weight,
            entropy=entropy_loss_weight,
        )
        self.routing_metrics = parts.make_metrics(
            routing_metrics, self.router, self.name
        )
        self._metric_names = list(routing_metrics)

    def _make_experts(self) -> keras.layers.Layer:
        check_experts(self._experts_given, self.num_experts, self.expert_units)
        if self._experts_given is not None:
            return self._experts_given
        return MLPExperts(
            self.num_experts,
            _checks.unit_sizes("expert_units", self.expert_units),
            self.activation,
            self.use_bias,
            dropout=self.dropout,
            kernel_initializer=self.kernel_initializer,
            kernel_regularizer=self.kernel_regularizer,
            seed=self.seed,
            dtype=self.dtype_policy,
            name="experts",
        )

    @property
    def capacity_factor(self) -> float | None:
        """How many slots the experts have, in even loads.

        May be changed as `dispatch` may, which says whether there are slots at all. An
        expert choice keeps the factor with which it was made.
        """
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        if factor is not None:
            _checks.positive_number("capacity_factor", factor)
        self._capacity_factor = factor

    @property
    def dispatch(self) -> str:
        """How tokens come to their experts.

        May be changed, the weights stay. A model that has been compiled or has
        predicted already keeps what it has traced until it is compiled again.
        """
        return self._dispatch

    @dispatch.setter
    def dispatch(self, name: str) -> None:
        factor, router = self.capacity_factor, self.router
        parts.check_dispatch(name, router, self.experts)
        parts.check_capacity_factor(factor, name, router, self._router_given is router)
        parts.check_priority(self.priority, name, factor, router)
        self._dispatch = name

    @property
    def variables(self) -> list[Any]:
        """The weights, and the sums of the metrics, which JAX must hand to a step."""
        metrics = getattr(self, "routing_metrics", None)
        return [*super().variables, *(metrics.sums if metrics else [])]

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        router_inputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
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
        tokens, mask = flat.tokens(inputs, mask)
        routed = tokens
        if router_inputs is not None:
            routed = flat.router_inputs(router_inputs, inputs)
        routing = self.router(routed, mask=mask, training=training)
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

    def _compute(self, tokens: Any, routing: Any, training: bool | None) -> Any:
        """(n, d) -> (n, u) through the experts of every token."""
        name, kept = self._dispatch_now(), None
        if name == "capacity" and self.router.choice == "token":
            outputs, kept = dispatch_lib.within_capacity(
                tokens,
                routing,
                self.experts,
                training,
                capacity_factor=self.capacity_factor,
                priority=self.priority,
            )
        elif name == "capacity":
            outputs = dispatch_lib.expert_choice(
                tokens, routing, self.experts, training
            )
        else:
            compute = getattr(dispatch_lib, name)
            outputs = compute(tokens, routing, self.experts, training)
        if self.routing_metrics is not None:
            self.routing_metrics.update_state(routing, kept)
        return ops.cast(outputs, self.compute_dtype)

    def _dispatch_now(self) -> str:
        """The dispatch of the graph that is being traced; the rule is in the docs."""
        if self.dispatch != "auto":
            return dispatch_lib.checked_here(self.dispatch)
        if self.router.choice == "expert" or self.capacity_factor is not None:
            return "capacity"
        if self.router.choice == "all" or self.top_k == self.num_experts:
            return "dense"
        return dispatch_lib.dropless_here(self.experts)

    def _add_losses(self, routing: Any, training: bool | None) -> None:
        """Add the auxiliary losses, weighted. Only this layer does so."""
        weights = dict(self.loss_weights)
        if not training:
            weights.pop("load", None)  # A count without noise: it has no gradient.
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
            router = keras.saving.serialize_keras_object(router)
        experts = self._experts_given
        if experts is not None:
            experts = keras.saving.serialize_keras_object(experts)
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "expert_units": self.expert_units,
            "top_k": self._top_k_given,
            "activation": keras.activations.serialize(self.activation),
            "router": router,
            "experts": experts,
            "dispatch": self.dispatch,
            "capacity_factor": self.capacity_factor,
            "priority": self.priority,
            "num_shared_experts": self.num_shared_experts,
            **{
                f"{name}_loss_weight": self.loss_weights.get(name, 0.0)
                for name in ("load_balancing", "router_z", "importance", "load")
            },
            "entropy_loss_weight": self.loss_weights.get("entropy", 0.0),
            "routing_metrics": self._metric_names,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoE:
        config = dict(config)
        for part in ("router", "experts"):
            if isinstance(config.get(part), dict):
                config[part] = keras.saving.deserialize_keras_object(config[part])
        return cls(**config)


def __getattr__(name: str) -> Any:
    """Give `HierarchicalMoE`, which has a file of its own, under its first address."""
    if name == "HierarchicalMoE":
        from keras_moe.layers.hierarchical_moe import HierarchicalMoE

        return HierarchicalMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
