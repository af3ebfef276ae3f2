"""The sparse mixture of experts: route, dispatch, combine.

Axis letters: n tokens, d input features, e experts, k choices a token, u output units.

y_i = sum over the k experts that the router chose for token i of w_ik f_k(x_i)
(Shazeer et al. 2017, equation 1), plus the shared experts, which see every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, losses, routers
from keras_moe import dispatch as dispatch_lib
from keras_moe import routing as routing_lib
from keras_moe._layer import Layer
from keras_moe.experts import MLPExperts, restored_axes
from keras_moe.initializers import independent
from keras_moe.layers._parts import (
    check_experts,
    check_leading_axes,
    checked_batch,
    default_name,
)
from keras_moe.metrics import RoutingMetrics


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
        self.router = self._make_router(router, top_k, capacity_factor)
        self.top_k = self.router.top_k
        self.experts = self._make_experts()
        self.num_shared_experts = _checks.count(
            "num_shared_experts", num_shared_experts
        )
        self.shared_experts = self._make_shared_experts()
        self.capacity_factor = capacity_factor
        self.dispatch = dispatch
        self.loss_weights = self._checked_loss_weights(
            load_balancing=load_balancing_loss_weight,
            router_z=router_z_loss_weight,
            importance=importance_loss_weight,
            load=load_loss_weight,
            entropy=entropy_loss_weight,
        )
        self.routing_metrics = self._make_metrics(routing_metrics)
        self._metric_names = list(routing_metrics)

    # The parts, and which of them go together.

    def _make_router(
        self, router: Any, top_k: int | None, capacity_factor: float | None
    ) -> keras.layers.Layer:
        router = "top_k" if router is None else router
        if isinstance(router, keras.layers.Layer):
            if getattr(router, "choice", None) not in dispatch_lib.SERVED:
                raise ValueError(
                    "`router` must be a layer of keras_moe.routers, or say like them "
                    f"by its attribute `choice`, one of {list(dispatch_lib.SERVED)}, "
                    f"who chooses. Received: router={router!r}"
                )
            if getattr(router, "num_experts", None) != self.num_experts:
                raise ValueError(
                    "`router` must route to `num_experts` experts. Received: "
                    f"num_experts={self.num_experts}, router={router!r} with "
                    f"num_experts={getattr(router, 'num_experts', None)}"
                )
            # A router of all experts has no k of its own.
            own = self.num_experts if router.choice == "all" else router.top_k
            if top_k not in (None, own):
                raise ValueError(
                    "`top_k` must be that of `router`, or None. "
                    f"Received: top_k={top_k}, router.top_k={own}"
                )
            return router
        kind = routers.KNOWN[_checks.one_of("router", router, routers.KNOWN)]
        if kind.choice == "all" and top_k not in (None, self.num_experts):
            raise ValueError(
                f"`top_k` must be None for the router {router!r}, which sends every "
                f"token to all experts. Received: top_k={top_k}"
            )
        arguments: dict[str, Any] = {"top_k": top_k or min(2, self.num_experts)}
        if self.seed is not None:
            # Not the stream of the experts' dropout, which has the seed itself.
            arguments["seed"] = self.seed + 1
        if kind.choice == "expert" and capacity_factor is not None:
            arguments["capacity_factor"] = capacity_factor
        known = inspect.signature(kind).parameters
        return kind(
            self.num_experts,
            **{name: arguments[name] for name in arguments if name in known},
            dtype=self.dtype_policy,
            name="router",
        )

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

    def _make_shared_experts(self) -> keras.layers.Layer | None:
        if self.num_shared_experts == 0:
            return None
        config = self.experts.get_config()
        if "num_experts" not in config:
            raise ValueError(
                "`num_shared_experts` needs experts that can be made in any number. "
                f"Received: num_shared_experts={self.num_shared_experts}, "
                f"experts={self.experts!r}"
            )
        shared = {"num_experts": self.num_shared_experts, "name": "shared_experts"}
        for name in ("kernel_initializer", "bias_initializer"):
            if name in config:
                # With one seed they would start as copies of the routed experts.
                shared[name] = independent(
                    getattr(self.experts, name), self.num_experts
                )
        if config.get("seed") is not None:
            shared["seed"] = config["seed"] + 2  # The router has the one between.
        return type(self.experts).from_config({**config, **shared})

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
        _checks.one_of("dispatch", name, dispatch_lib.KNOWN)
        served = ("auto", *dispatch_lib.SERVED[self.router.choice])
        if name not in served:
            raise ValueError(
                f"`dispatch` must be one of {list(served)} for the router "
                f"{type(self.router).__name__}. Received: dispatch={name!r}"
            )
        dispatch_lib.check_serves(name, self.experts)
        self._check_capacity_factor(name)
        self._check_priority(name)
        self._dispatch = name

    def _check_priority(self, dispatch: str) -> None:
        full = dispatch == "capacity" or (
            dispatch == "auto" and self.capacity_factor is not None
        )
        if self.priority != "position" and not (full and self.router.choice == "token"):
            raise ValueError(
                "`priority` needs experts that can be full, by a `capacity_factor` or "
                'dispatch="capacity", and tokens that choose. Received: '
                f"priority={self.priority!r}, dispatch={dispatch!r}, "
                f"capacity_factor={self.capacity_factor}, "
                f"router={type(self.router).__name__}"
            )

    def _check_capacity_factor(self, dispatch: str) -> None:
        if self.capacity_factor is None:
            return
        full = self.router.choice == "expert" or dispatch in ("auto", "capacity")
        if not full or self.router.choice == "all":
            raise ValueError(
                "`capacity_factor` needs experts that can be full, which is "
                'dispatch="capacity". Received: '
                f"capacity_factor={self.capacity_factor}, dispatch={dispatch!r}, "
                f"router={type(self.router).__name__}"
            )
        if self.router.choice == "expert" and self._router_given is self.router:
            raise ValueError(
                "`capacity_factor` belongs to the router here, which says how many "
                "tokens an expert chooses. Received: "
                f"capacity_factor={self.capacity_factor}, router={self.router!r}"
            )

    def _checked_loss_weights(self, **weights: float | None) -> dict[str, float]:
        for name, weight in weights.items():
            if weight is None:
                weights[name] = self.router.default_loss_weights.get(name, 0.0)
                continue
            argument = f"{name}_loss_weight"
            weights[name] = _checks.finite_number(argument, weight)
            if weight != 0.0 and name not in self.router.supported_losses:
                raise ValueError(
                    f"`{argument}` must be 0 for the router "
                    f"{type(self.router).__name__}, for which this loss has no "
                    f"meaning. Received: {argument}={weight}"
                )
        return {name: weight for name, weight in weights.items() if weight}

    def _make_metrics(self, names: Sequence[str]) -> RoutingMetrics | None:
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(
                "`routing_metrics` must be a sequence of names out of "
                f"{sorted(RoutingMetrics.KNOWN)}. Received: routing_metrics={names!r}"
            )
        if not names:
            return None
        unknown = [name for name in names if name not in RoutingMetrics.KNOWN]
        if unknown:
            raise ValueError(
                "`routing_metrics` must hold names out of "
                f"{sorted(RoutingMetrics.KNOWN)}. Received: {unknown[0]!r} in "
                f"routing_metrics={names!r}"
            )
        lost = sorted(RoutingMetrics.NEEDS_PROBS.intersection(names))
        if lost and isinstance(self.router, routers.HashRouter):
            raise ValueError(
                f"`routing_metrics` must not hold {lost} for the router HashRouter, "
                f"which has no probabilities. Received: routing_metrics={names!r}"
            )
        return RoutingMetrics(self.num_experts, names, prefix=self.name)

    @property
    def variables(self) -> list[Any]:
        """The weights, and the sums of the metrics, which JAX must hand to a step."""
        metrics = getattr(self, "routing_metrics", None)
        return [*super().variables, *(metrics.sums if metrics else [])]

    # What the layer computes.

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
            self.router.build(self._router_shape(inputs_shape, router_inputs_shape))

    def _router_shape(
        self, inputs_shape: tuple[int | None, ...], router_inputs_shape: Any
    ) -> tuple[int | None, ...]:
        """Return the shape of what the router sees, flattened."""
        if router_inputs_shape is None:
            if isinstance(self.router, routers.HashRouter):
                raise ValueError(
                    "`router_inputs` must be given for the router HashRouter, which "
                    "hashes integer ids and not features. Received: router_inputs=None"
                )
            return (None, inputs_shape[-1])
        if len(router_inputs_shape) < len(inputs_shape):
            return (None,)  # Ids.
        return (None, router_inputs_shape[-1])

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool | None = None,
        router_inputs: Any = None,
    ) -> Any:
        leading = ops.shape(inputs)[:-1]
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        if mask is None:
            # Keras hands it over only where the inputs are the one tensor of a call.
            mask = _backend.keras_mask(inputs)
        if mask is not None:
            mask = ops.convert_to_tensor(mask)
            check_leading_axes("mask", mask.shape, inputs.shape, features=0)
            mask = ops.reshape(ops.cast(mask, "bool"), (-1,))
            # Whatever stands in padding, NaN too, reaches no output and no gradient.
            tokens = routing_lib.rows_where(mask, tokens)
        routed = tokens
        if router_inputs is not None:
            ids = len(router_inputs.shape) < len(inputs.shape)
            shapes = router_inputs.shape, inputs.shape
            check_leading_axes("router_inputs", *shapes, features=0 if ids else 1)
            router_inputs = checked_batch("router_inputs", router_inputs, inputs)
            routed = _as_tokens(router_inputs, len(inputs.shape))

        routing = self.router(routed, mask=mask, training=training)
        outputs = self._compute(tokens, routing, training)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens, training=training)
            outputs = outputs + ops.sum(shared, axis=1)

        self._add_losses(routing, training)
        if mask is not None:
            outputs = routing_lib.rows_where(mask, outputs)
        return ops.reshape(outputs, (*restored_axes(leading), outputs.shape[-1]))

    def _compute(self, tokens: Any, routing: Any, training: bool | None) -> Any:
        """(n, d) -> (n, u) through the experts of every token."""
        name, kept = self._dispatch_now(), None
        if name == "capacity" and self.router.choice == "token":
            outputs, kept = self._within_capacity(tokens, routing, training)
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

    def _within_capacity(
        self, tokens: Any, routing: Any, training: bool | None
    ) -> tuple[Any, Any]:
        """Return outputs (n, u), and which choices (n, k) found a place."""
        # A token that is not finite takes no place from others; its output is NaN.
        finite = ops.all(ops.isfinite(routing.combine_weights), axis=-1)
        mask = finite
        if routing.mask is not None:
            mask = ops.logical_and(finite, routing.mask)
        factor = 1.25 if self.capacity_factor is None else self.capacity_factor
        slots = routing_lib.capacity_slots(
            routing._replace(mask=mask),
            self.num_experts,
            routing_lib.expert_capacity(
                ops.shape(tokens)[0], self.num_experts, self.top_k, factor
            ),
            self.priority,
        )
        outputs = dispatch_lib.capacity(
            tokens, routing, self.experts, training, slots=slots
        )
        return dispatch_lib.nan_where(ops.logical_not(finite), outputs), slots.kept

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
        n = ops.shape(routing.router_probs)[0] if self.loss_weights else 0
        formulas = {
            "load_balancing": lambda: losses.load_balancing_loss(
                routing.router_probs, routing.expert_indices, routing.mask
            ),
            "router_z": lambda: losses.router_z_loss(
                routing.router_logits, routing.mask
            ),
            "importance": lambda: losses.importance_loss(
                routing_lib.gates(routing, self.num_experts, n), routing.mask
            ),
            "load": lambda: losses.load_loss(routing.choice_probs, routing.mask),
            "entropy": lambda: losses.entropy_loss(routing.router_probs, routing.mask),
        }
        for name, weight in self.loss_weights.items():
            if name == "load" and not training:
                continue  # Without noise it is a count, which has no gradient.
            self.add_loss(weight * formulas[name]())

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


def _as_tokens(router_inputs: Any, rank: int) -> Any:
    """Flatten the leading axes; ids have no feature axis."""
    if len(router_inputs.shape) == rank - 1:
        return ops.reshape(router_inputs, (-1,))
    return ops.reshape(router_inputs, (-1, router_inputs.shape[-1]))


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalMoE(MoE):
    """Two levels of gates: a token chooses groups of experts, and experts in each.

    A `MoE` whose router is a `keras_moe.routers.HierarchicalRouter`. Where there are
    many experts, each gate has few of them to choose from.

    Args:
        num_groups: int, number of groups g.
        experts_per_group: int, experts in each, so that there are
            `e = num_groups * experts_per_group`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        top_k_groups: int, how many groups a token keeps.
        top_k_experts: int, how many experts it keeps in each of them.
        **kwargs: further arguments of `MoE`, but for `router`.

    Call arguments:
        inputs: tensor of shape `(..., d)`; further ones as in `MoE`.

    Returns:
        A tensor of shape `(..., u)`.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:

    >>> moe = keras_moe.layers.HierarchicalMoE(4, 8, expert_units=(32, 16))
    >>> moe(np.ones((4, 16))).shape == (4, 16), moe.num_experts, moe.top_k
    (True, 32, 4)

    References:
        - [Jordan & Jacobs, 1994: Hierarchical Mixtures of Experts and the EM
          Algorithm](https://doi.org/10.1162/neco.1994.6.2.181)
        - [Shazeer et al., 2017: Outrageously Large Neural Networks, appendix B](
          https://arxiv.org/abs/1701.06538)
    """

    def __init__(
        self,
        num_groups: int,
        experts_per_group: int,
        expert_units: int | Sequence[int] | None = None,
        top_k_groups: int = 2,
        top_k_experts: int = 2,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in ("router", "num_experts", "top_k"):
            if argument in kwargs:
                raise ValueError(
                    f"`{argument}` follows from the groups in HierarchicalMoE; for "
                    "another router use MoE(router=HierarchicalRouter(...)). "
                    f"Received: {argument}={kwargs[argument]!r}"
                )
        self._levels = {
            "num_groups": num_groups,
            "experts_per_group": experts_per_group,
            "top_k_groups": top_k_groups,
            "top_k_experts": top_k_experts,
        }
        router = routers.HierarchicalRouter(
            **self._levels, dtype=kwargs.get("dtype"), name="router"
        )
        super().__init__(
            router.num_experts,
            expert_units,
            router.top_k,
            router=router,
            name=name or default_name("hierarchical_moe"),
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for name in ("num_experts", "top_k", "router"):
            del config[name]
        return {**config, **self._levels}
