"""A dispatch on eight devices beside every expert on every row of one device.

Part of `tests.support.distributed_suite`. One program of outputs and gradients is run
for several routings: also for those that send all rows to one device, which has no room
for them.
"""

import jax
import keras
import numpy as np
from keras import ops

from keras_moe import dispatch
from keras_moe.dispatch import _even
from keras_moe.experts import GLUExperts, MLPExperts
from keras_moe.routing import Routing

ROWS, CHOICES, FEATURES, UNITS, EXPERTS = 96, 2, 6, 5, 8


def routings():
    """Return expert indices and masks by name."""
    random = np.random.default_rng(0)
    shape, every = (ROWS, CHOICES), np.ones((ROWS,), bool)
    return {
        "even": (random.integers(0, EXPERTS, shape), every),
        "all on one": (np.full(shape, 5), every),
        "masked": (random.integers(0, EXPERTS, shape), random.random(ROWS) < 0.5),
    }


def experts_of(kind, **kwargs):
    keras.utils.set_random_seed(0)
    if kind == "glu":
        experts = GLUExperts(EXPERTS, 7, UNITS, name="experts", **kwargs)
    else:
        experts = MLPExperts(EXPERTS, (7, UNITS), name="experts", **kwargs)
    experts.build((None, FEATURES))
    return experts


def step_of(experts, compute, weighted):
    """Return a compiled function: loss, outputs and gradients of a routing."""
    variables = experts.trainable_variables

    def loss(weights, tokens, gates, indices, mask):
        with keras.StatelessScope(list(zip(variables, weights, strict=True))):
            routing = Routing(indices, gates if weighted else None, mask=mask)
            outputs = compute(tokens, routing, experts, True)
        outputs = ops.where(
            ops.reshape(mask, (-1, *[1] * (outputs.ndim - 1))), outputs, 0
        )
        return (outputs**2 * ops.arange(1, UNITS + 1)).sum(), outputs

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def dense(tokens, routing, experts, training):
    """Every expert on every row, of which the choices are taken."""
    outputs = experts(tokens, training=training)
    outputs = ops.take_along_axis(outputs, routing.expert_indices[..., None], axis=1)
    if routing.combine_weights is None:
        return outputs
    return ops.sum(outputs * routing.combine_weights[..., None], axis=1)


def differences(name, distribution, kind="mlp", weighted=True):
    """Return the largest difference by routing.

    Args:
        name: a function of `keras_moe.dispatch`.
        distribution: function of the experts.
        kind: "mlp" or "glu", the experts.
        weighted: bool; without weights the output of every choice is returned.
    """
    keras.config.set_floatx("float64")
    random = np.random.default_rng(1)
    tokens, gates = random.normal(size=(ROWS, FEATURES)), random.random((ROWS, CHOICES))
    found = []
    for many in (False, True):
        active = distribution(experts_of(kind)) if many else None
        keras.distribution.set_distribution(active)
        experts = experts_of(kind)
        compute = getattr(dispatch, name)
        step = step_of(
            experts,
            (lambda *given, c=compute: dispatch.on_devices(c, *given))
            if many
            else dense,
            weighted,
        )
        weights = [v.value for v in experts.trainable_variables]
        results = {}
        for case, (indices, mask) in routings().items():
            given = tokens, gates, indices, mask
            if many:
                layouts = [active.get_data_layout(x.shape) for x in given]
                given = jax.device_put(given, tuple(x.backend_layout for x in layouts))
            results[case] = jax.tree.leaves(step(weights, *given))
        keras.distribution.set_distribution(None)
        found.append(results)
    keras.config.set_floatx("float32")
    one, several = found
    return {
        case: max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max())
            for a, b in zip(one[case], several[case], strict=True)
        )
        for case in one
    }


def rows_beyond(batch, devices):
    """Return the rows of one expert that its device has no room for, if it has all."""
    visible, e = ROWS * CHOICES // batch, EXPERTS // devices
    mean = visible // devices
    return visible - e * _even.slots_per_expert(mean, e, _even.rows_per_turn(mean, e))


def dropout(distribution):
    """Return a loss that is linear in the last kernel, and its gradient times that.

    They are equal if the gradient drops what the outputs dropped.
    """
    keras.config.set_floatx("float64")
    make = {"dropout": 0.5, "use_bias": False, "seed": 0}
    active = distribution(experts_of("mlp", **make))
    keras.distribution.set_distribution(active)
    experts = experts_of("mlp", **make)
    indices, mask = routings()["all on one"]
    layout = active.get_data_layout((ROWS, FEATURES)).backend_layout
    tokens = jax.device_put(np.ones((ROWS, FEATURES)), layout)
    gates = np.ones((ROWS, CHOICES))
    variables = experts.trainable_variables

    @jax.jit
    @jax.value_and_grad
    def of(kernel, first, tokens):
        weights = [(variables[0], first), (variables[1], kernel)]
        with keras.StatelessScope(weights):
            outputs = dispatch.on_devices(
                dispatch.ragged,
                tokens,
                Routing(indices, gates, mask=mask),
                experts,
                True,
            )
        return (outputs * ops.reshape(ops.arange(ROWS), (-1, 1))).sum()

    first, last = (v.value for v in variables)
    loss, gradient = of(last, first, tokens)
    keras.distribution.set_distribution(None)
    keras.config.set_floatx("float32")
    return [float(loss), float((gradient * last).sum())]
