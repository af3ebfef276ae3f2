"""Dispatch on several devices: each computes its part, inside `jax.shard_map`.

Axis letters: n tokens, d input features, u expert output units, e experts, k choices
per token, c capacity (slots per expert), p devices of a mesh axis.

XLA's partitioner replicates the sort, the gathers and the loops of a dispatch: every
device would compute all rows. With an active `keras.distribution`, a device computes

- the rows of its own tokens, if the experts are replicated. The forward pass has no
  collective; the gradients of the experts are summed (data parallelism);
- the choices of its own tokens that go to its own experts, if the first axis of the
  experts is split over another mesh axis. The outputs are summed over that axis;
- all choices that go to its own experts, if the first axis of the experts is split over
  the axis of the batch. Tokens are gathered and outputs summed and scattered;
  "capacity" sends its slots with two all-to-all instead.

Outputs are those of one device, with one exception: the tokens of "capacity" compete
for slots only with the tokens of the same part of the batch, and c is computed from
n / p. Expert choice competes over the whole batch, and gathers the tokens for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import _mesh
from keras_moe import routing as routing_lib
from keras_moe.dispatch._capacity import (
    capacity,
    slots_within_capacity,
    within_capacity,
)
from keras_moe.dispatch._dense import dense
from keras_moe.dispatch._even import rows_per_turn, slots_per_expert
from keras_moe.dispatch._rows import nan_where
from keras_moe.dispatch._share import Share, add_beyond, one_expert
from keras_moe.routing import ExpertChoiceRouting, Routing


class Placement(NamedTuple):
    """Where tokens and experts are.

    Attributes:
        mesh: a `jax.sharding.Mesh`.
        batch: the mesh axis over which tokens are split.
        experts: the mesh axis over which experts are split; None: they are replicated.
    """

    mesh: Any
    batch: str
    experts: str | None

    @property
    def shared(self) -> bool:
        """Whether tokens and experts are split over the same axis."""
        return self.experts == self.batch

    def size(self, axis: str | None) -> int:
        """Return the number of devices along `axis`; 1 for None."""
        return 1 if axis is None else self.mesh.shape[axis]


def placement(experts: Any) -> Placement | None:
    """Return the placement by the active `keras.distribution`.

    None if the plain dispatch is to be used: on one device, on other backends, and for
    experts whose variables are not stacked, or split along other axes than the first.
    """
    active = _mesh.active()
    # `on_rows` is the interface of stacked experts. A part of them has a smaller e.
    if active is None or not hasattr(experts, "on_rows"):
        return None
    axes = set()
    for variable in experts.variables:
        if _is_seed(variable):
            continue
        layout = active.get_variable_layout(variable)
        if not isinstance(layout, keras.distribution.TensorLayout):
            return None
        first, *others = layout.axes or (None,)
        stacked = variable.shape[:1] == (experts.num_experts,)
        if any(others) or isinstance(first, tuple) or not stacked:
            return None
        axes.add(first)
    if len(axes) != 1:
        return None
    mesh = active.device_mesh.backend_mesh
    return Placement(mesh, active.batch_dim_name, axes.pop())


def on_devices(
    compute: Callable[..., Any],
    tokens: Any,
    routing: Any,
    experts: Any,
    training: bool | None = None,
    **options: Any,
) -> Any:
    """Return `compute(tokens, routing, experts, training, **options)`.

    Under a `keras.distribution` every device computes its part; else it is that call.

    Args:
        compute: a dispatch, or `within_capacity`.
        tokens: `(n, d)`.
        routing: the record that `compute` supports.
        experts: layer of e experts.
        training: bool, whether dropout is active.
        **options: further arguments of `compute`.
    """
    n = tokens.shape[0]
    # XLA splits the matmuls of the dense dispatch without help.
    place = None if compute is dense or not isinstance(n, int) else placement(experts)
    if place is None or n == 0:
        return compute(tokens, routing, experts, training, **options)
    parts = place.size(place.batch)
    if n % parts:
        # `shard_map` needs even parts. Fewer rows are calls by hand, as in a build.
        if n > parts:
            warnings.warn(_UNEVEN.format(n, parts, place.batch), stacklevel=2)
        return compute(tokens, routing, experts, training, **options)
    part = _Part(compute, place, experts, training, options)
    if isinstance(routing, ExpertChoiceRouting):
        outputs = part.run(part.of_slots, tokens, *_slots(routing, n, place))
        return nan_where(routing.invalid, outputs)
    by_token = part.with_capacity if compute is within_capacity else part.of_choices
    return part.run(by_token, tokens, *_choices(routing, place))


_UNEVEN = (
    "Every device computes all of {} rows, since they are not a multiple of the {} "
    "devices of the axis {!r}: pad the batch with rows of sample weight 0."
)


class _Part:
    """The part of a dispatch that one device computes."""

    def __init__(
        self,
        compute: Callable[..., Any],
        place: Placement,
        experts: Any,
        training: bool | None,
        options: dict[str, Any],
    ) -> None:
        self.compute = compute
        self.place = place
        self.whole = experts
        self.training = training
        self.options = options
        self.num_experts = experts.num_experts // place.size(place.experts)
        self.splits = place.experts is not None
        self.seeds = [v for v in experts.variables if _is_seed(v)]
        self.weights = [v for v in experts.variables if not _is_seed(v)]

    def run(
        self, function: Callable[..., Any], tokens: Any, fields: Any, specs: Any
    ) -> Any:
        """Return `function(tokens, fields, experts)` of all devices.

        The variables of the experts are arguments: a function under `shard_map` sees
        only the device's part of its arguments.
        """
        import jax
        from jax.sharding import PartitionSpec

        place = self.place

        def local(
            weights_here: Any, seeds_here: Any, tokens: Any, fields: Any
        ) -> tuple[Any, Any]:
            # Devices with other rows or experts draw other numbers.
            axes = dict.fromkeys((place.batch, place.experts or place.batch))
            index = jax.lax.axis_index(tuple(axes))
            shift = ops.stack([ops.cast(index, "uint32"), ops.zeros((), "uint32")])
            with self._scope(weights_here, [x + shift for x in seeds_here]) as scope:
                outputs = function(tokens, fields, self._experts(self.num_experts))
            return outputs, [scope.get_current_value(v) - shift for v in self.seeds]

        by_expert = PartitionSpec(place.experts)
        by_token = PartitionSpec(place.batch)
        everywhere = PartitionSpec()
        outputs, states = jax.shard_map(
            local,
            mesh=place.mesh,
            in_specs=(by_expert, everywhere, by_token, specs),
            out_specs=(by_token, everywhere),
            check_vma=False,  # The dispatches have custom gradients.
        )(
            [ops.convert_to_tensor(v) for v in self.weights],
            [ops.convert_to_tensor(v) for v in self.seeds],
            tokens,
            fields,
        )
        for variable, state in zip(self.seeds, states, strict=True):
            variable.assign(state)
        return outputs

    def _scope(self, weights: Any, seeds: Any) -> Any:
        """Return a scope in which the variables have values of other shapes."""
        scope = keras.StatelessScope()
        # Its constructor refuses them.
        scope.state_mapping = {
            id(v): value
            for v, value in zip(
                [*self.weights, *self.seeds], [*weights, *seeds], strict=True
            )
        }
        return scope

    def _experts(self, num_experts: int) -> Any:
        """Return the same layer of experts with a smaller e."""
        experts = object.__new__(type(self.whole))
        vars(experts).update(vars(self.whole), num_experts=num_experts)
        return experts

    def of_choices(self, tokens: Any, fields: Any, experts: Any) -> Any:
        """Compute the dispatches without drops."""
        import jax

        if self.place.shared:
            tokens, fields = jax.lax.all_gather(
                (tokens, fields), self.place.batch, tiled=True
            )
        routing = Routing(**{"combine_weights": None, **fields})
        if not self.splits:
            return self.compute(tokens, routing, experts, self.training)
        routing, own = self._own_choices(routing)
        outputs = self._compute_share(tokens, routing, experts)
        if routing.combine_weights is None:
            outputs = routing_lib.rows_where(own, outputs)
        return self._sum(outputs)

    def _compute_share(self, tokens: Any, routing: Routing, experts: Any) -> Any:
        """Compute the choices of the device's experts, and no room for all others."""
        m, e = math.prod(routing.expert_indices.shape), self.num_experts
        expected = -(-m // self.place.size(self.place.experts))
        rows = e * slots_per_expert(expected, e, rows_per_turn(expected, e))
        if rows >= m:
            return self.compute(tokens, routing, experts, self.training)
        share = Share(routing_lib.sort_choices(routing, e), rows)
        outputs = self.compute(tokens, routing, experts, self.training, share=share)
        weights = routing.combine_weights
        return add_beyond(
            outputs,
            tokens,
            None if weights is None else ops.cast(weights, outputs.dtype),
            [ops.convert_to_tensor(v) for v in self.weights],
            share,
            self._one_expert,
            [ops.convert_to_tensor(v) for v in self.seeds],
            rows_per_turn(rows, e),
        )

    def _one_expert(self, weights: Any, seeds: Any, rows: Any) -> Any:
        """(b, d) -> (b, u), by the one expert that has these weights."""
        with self._scope(weights, seeds):
            return one_expert(rows, self._experts(1), self.training)

    def _own_choices(self, routing: Routing) -> tuple[Routing, Any]:
        """Return the choices of the device's experts, and bool (n, k): which they are.

        Its experts have the indices 0, 1, .... Other choices have the index e of the
        device and the weight 0.
        """
        local = routing.expert_indices - self._first_expert()
        own = ops.logical_and(local >= 0, local < self.num_experts)
        weights = routing.combine_weights
        if weights is not None:
            weights = ops.where(own, weights, ops.zeros_like(weights))
        return routing._replace(
            expert_indices=ops.where(own, local, self.num_experts),
            combine_weights=weights,
        ), own

    def _first_expert(self) -> Any:
        import jax

        return jax.lax.axis_index(self.place.experts) * self.num_experts

    def with_capacity(self, tokens: Any, fields: Any, experts: Any) -> tuple[Any, Any]:
        """Compute "capacity": the tokens of a part of the batch compete."""
        import jax

        routing = Routing(**fields)
        slots, finite = slots_within_capacity(
            tokens, routing, self.whole.num_experts, **self.options
        )
        if not self.splits:
            outputs = capacity(tokens, routing, experts, self.training, slots=slots)
        elif self.place.shared:
            remote: Any = _AllToAll(experts, self.place)
            outputs = capacity(tokens, routing, remote, self.training, slots=slots)
        else:
            first, c = self._first_expert(), slots.tokens.shape[1]
            routing, own = self._own_choices(routing)
            here = slots._replace(
                tokens=jax.lax.dynamic_slice_in_dim(
                    slots.tokens, first, self.num_experts
                ),
                slot_of_choice=slots.slot_of_choice - first * c,
                kept=ops.logical_and(slots.kept, own),
            )
            outputs = self._sum(
                capacity(tokens, routing, experts, self.training, slots=here)
            )
        return nan_where(ops.logical_not(finite), outputs), slots.kept

    def of_slots(self, tokens: Any, fields: Any, experts: Any) -> Any:
        """Compute expert choice: a part of the slots, of tokens of the whole batch."""
        import jax

        tokens = jax.lax.all_gather(tokens, self.place.batch, tiled=True)
        routing = ExpertChoiceRouting(**fields)
        sums = self.compute(tokens, routing, experts, self.training)
        sums = jax.lax.psum_scatter(sums, self.place.batch, tiled=True)
        if self.splits and not self.place.shared:
            sums = _summed(sums, self.place)
        return sums

    def _sum(self, outputs: Any) -> Any:
        """Sum the outputs of all experts; each device keeps those of its tokens."""
        import jax

        if self.place.shared:
            return jax.lax.psum_scatter(outputs, self.place.batch, tiled=True)
        return _summed(outputs, self.place)


def _summed(outputs: Any, place: Placement) -> Any:
    """Sum `outputs` over the axis of the experts.

    All devices of the axis get the same gradient, divided by their number (the rule of
    `shard_map` for replicated results), which a product restores without a collective.
    """
    import jax

    @jax.custom_vjp
    def total(outputs: Any) -> Any:
        return jax.lax.psum(outputs, place.experts)

    total.defvjp(
        lambda outputs: (total(outputs), None),
        lambda _, upstream: (upstream * place.size(place.experts),),
    )
    return total(outputs)


class _AllToAll:
    """Experts that get slots from all devices of an axis, and send the outputs back."""

    def __init__(self, experts: Any, place: Placement) -> None:
        self.experts = experts
        self.axis = place.experts

    def on_slots(self, slots: Any, training: bool | None = None) -> Any:
        """(e, c, d) -> (e, c, u), computed as (e / p, p c, d) on each device."""
        import jax

        slots = jax.lax.all_to_all(slots, self.axis, 0, 1, tiled=True)
        outputs = self.experts.on_slots(slots, training=training)
        return jax.lax.all_to_all(outputs, self.axis, 1, 0, tiled=True)


def _is_seed(variable: Any) -> bool:
    """Whether a variable is the state of a random generator."""
    return variable.dtype == "uint32"


def _choices(routing: Routing, place: Placement) -> tuple[dict[str, Any], Any]:
    """Return the fields of a record, and how they are split."""
    from jax.sharding import PartitionSpec

    names = ("expert_indices", "combine_weights", "mask")
    fields = {name: getattr(routing, name) for name in names}
    fields = {name: value for name, value in fields.items() if value is not None}
    return fields, PartitionSpec(place.batch)


def _slots(
    routing: ExpertChoiceRouting, n: int, place: Placement
) -> tuple[dict[str, Any], Any]:
    """Return the slots of each expert, padded for the axis that splits them."""
    from jax.sharding import PartitionSpec

    indices, weights = routing.token_indices, routing.combine_weights
    axis = None if place.shared else place.batch
    pads = ((0, 0), (0, -indices.shape[1] % place.size(axis)))
    fields = {
        "token_indices": ops.pad(indices, pads, constant_values=n),
        "combine_weights": ops.pad(weights, pads),
    }
    return fields, PartitionSpec(place.experts, axis)
