"""Layers on eight devices of JAX, which `tests/test_distribution.py` runs in a process.

The devices must be made before JAX starts. `gradients` has routers, dispatches and
layers of several tasks in one model and in float64, `split_dispatch` the dispatches
without drops for routings of all kinds; `fitted` trains in float32.
"""

import json
import os
import sys
import warnings

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np
from keras.distribution import DataParallel, DeviceMesh

import keras_moe
from keras_moe import layers
from keras_moe.dispatch import _blocked
from keras_moe.distribution import expert_parallel
from tests.support import planned_steps, split_dispatch

# Eight sizes of blocks, which is the default, take four times as long to compile.
_blocked.block_sizes = lambda *_: (8, 16)

ROWS, FEATURES, UNITS, EXPERTS = 48, 6, 5, 8
# By name: the mesh, and the axis of the experts.
MESHES = {
    "data": ({"batch": 8}, None),
    "shared": ({"batch": 8}, "batch"),
    "2 x 4": ({"batch": 2, "expert": 4}, "expert"),
    "1 x 8": ({"batch": 1, "expert": 8}, "expert"),
}
# The parts that are compared on every mesh; `--all` compares all of them on all.
FEW = ("capacity", "expert_choice", "bias_balanced", "ple")
TASKS = 2


class Fixed(layers.MoE):
    """A mixture with a dispatch that "auto" may select only on other devices."""

    def __init__(self, fixed: str, units=(7, UNITS), **kwargs):
        super().__init__(EXPERTS, units, **kwargs)
        self._fixed = fixed

    def _resolve_dispatch(self) -> str:
        return self._fixed


class Sparse(layers.MMoE):
    """`MMoE` that computes chosen experts."""

    def _resolve_dispatch(self) -> str:
        return "ragged"


def parts() -> dict:
    """Return a layer for routers, dispatches and layers of several tasks.

    Routers have the dispatch whose program is the shortest.
    """
    return {
        "dense": Fixed("dense", router_z_loss_weight=0.1),
        # Without drops: tokens compete within their part of the batch.
        "capacity": Fixed(
            "capacity", capacity_factor=EXPERTS / 2, num_shared_experts=1
        ),
        "expert_choice": Fixed("capacity", router="expert_choice"),
        "bias_balanced": Fixed("dense", router="bias_balanced"),
        "sinkhorn": Fixed("dense", UNITS, router="sinkhorn"),
        "mmoe": layers.MMoE(EXPERTS, (7, UNITS), TASKS),
        "sparse_mmoe": Sparse(
            EXPERTS, UNITS, TASKS, top_k=1, load_balancing_loss_weight=0.1
        ),
        "ple": layers.PLE(1, 2, 3, (7, UNITS), TASKS),
    }


class Everything(keras.Model):
    """Parts, on the same inputs and a row of a table."""

    def __init__(self, names=None) -> None:
        super().__init__(name="everything")
        self.table = keras.layers.Embedding(16, FEATURES, name="table")
        made = parts()
        for name, part in made.items():
            part.name = name
        self.parts = [made[name] for name in names or made]

    def call(self, inputs, training=None):
        x, ids = inputs
        x = x + self.table(ids)
        return [part(x, training=training) for part in self.parts]


def distribution(name: str | None, build):
    """Return the distribution of a mesh; None for one device."""
    if name is None:
        return None
    sizes, axis = MESHES[name]
    if axis is None:
        return DataParallel(DeviceMesh(tuple(sizes.values()), list(sizes)))
    return expert_parallel(build(), sizes, expert_axis=axis)


def numbers(tree) -> list:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(tree)]


def everything(names=None):
    keras.utils.set_random_seed(0)
    model = Everything(names)
    model((np.zeros((ROWS, FEATURES)), np.zeros((ROWS,), int)), training=False)
    return model


def gradients(mesh: str | None, rows: int = ROWS, names=None) -> dict:
    """Return loss, outputs, gradients and new state of one step in float64."""
    keras.config.set_floatx("float64")
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, FEATURES))
    ids = random.integers(0, 16, size=(rows,))
    weights = random.normal(size=(rows, UNITS))
    active = distribution(mesh, lambda: everything(names))
    keras.distribution.set_distribution(active)
    model = everything(names)
    # The draws of an initializer may differ under a distribution.
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) / 2)
    if active is not None and rows % 8 == 0:
        x, ids = (
            jax.device_put(value, active.get_data_layout(value.shape).backend_layout)
            for value in (x, ids)
        )

    @jax.jit
    def step(trained, fixed, x):
        def loss(trained, x):
            outputs, state, losses = model.stateless_call(
                trained, fixed, (x, ids), training=True, return_losses=True
            )
            leaves = jax.tree.leaves(outputs)
            return sum((y**2 * weights).sum() for y in leaves) + sum(losses), (
                outputs,
                state,
            )

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trained, x)

    trained = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    (loss, (outputs, state)), (by_weights, by_inputs) = step(trained, fixed, x)
    keras.distribution.set_distribution(None)
    keras.config.set_floatx("float32")
    paths = [v.path for v in model.trainable_variables]
    return {
        "loss": numbers(loss),
        "outputs": numbers(outputs),
        "inputs": numbers(by_inputs),
        "state": numbers(state),
        **dict(zip(paths, numbers(by_weights), strict=True)),
    }


def ranker():
    """A model of two tasks: a table, a mixture and PLE."""
    keras.utils.set_random_seed(0)
    ids, x = keras.Input((), dtype="int32"), keras.Input((FEATURES,))
    hidden = keras.layers.Concatenate()(
        [keras.layers.Embedding(16, 4, name="table")(ids), x]
    )
    hidden = layers.MoE(
        EXPERTS,
        FEATURES,
        router="bias_balanced",
        routing_metrics=["load_cv", "router_entropy"],
        name="moe",
    )(hidden)
    tasks = layers.PLE(1, 2, 3, 8, ["click", "stay"], name="ple")(hidden)
    outputs = {
        "click": layers.Tower((), "sigmoid", name="click")(tasks["click"]),
        "stay": layers.Tower((), name="stay")(tasks["stay"]),
    }
    return keras_moe.multitask.MultiTaskModel([ids, x], outputs)


def fitted(mesh: str | None) -> dict:
    """Train for two epochs of three batches; return history, weights and slots."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 16, size=(96,)).astype("int32")
    x = random.normal(size=(96, FEATURES)).astype("float32")
    y = {
        "click": (x[:, :1] > 0).astype("float32"),
        "stay": x[:, 1:2] * (1 + ids[:, None] % 3),
    }
    active = distribution(mesh, ranker)
    keras.distribution.set_distribution(active)
    model = ranker()
    model.compile(
        keras.optimizers.Adam(0.01),
        {"click": "binary_crossentropy", "stay": "mse"},
        metrics={"click": [keras.metrics.AUC(name="auc")]},
    )
    history = model.fit([ids, x], y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    measured = model.evaluate([ids, x], y, batch_size=32, return_dict=True, verbose=0)
    found = {
        "history": history.history,
        "measured": measured,
        "weights": {v.path: np.asarray(v.value).tolist() for v in model.weights},
        "shards": {
            v.path: [list(v.shape), list(v.value.addressable_shards[0].data.shape)]
            for v in [*model.weights, *model.optimizer.variables]
        },
    }
    if mesh not in (None, "data"):
        found["summary"] = active.summary()
    keras.distribution.set_distribution(None)
    return found


def on_data(layer, x, active):
    """Return outputs of a layer in training, compiled; its batch is split."""
    keras.distribution.set_distribution(active)
    variables = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]
    call = jax.jit(lambda t, s, x: layer.stateless_call(t, s, x, training=True))
    outputs, state = call(variables, state, x)
    keras.distribution.set_distribution(None)
    return np.asarray(outputs), numbers(state)


def capacity() -> dict:
    """Return outputs of a full mixture for one device, eight, and eight batches."""
    layer = layers.MoE(EXPERTS, UNITS, capacity_factor=0.5)
    x = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype("float32")
    layer.build(x.shape)
    batches = [on_data(layer, part, None)[0] for part in np.split(x, 8)]
    return {
        "one device": on_data(layer, x, None)[0].tolist(),
        "eight devices": on_data(layer, x, DataParallel())[0].tolist(),
        "eight batches": np.concatenate(batches).tolist(),
    }


def dropout() -> dict:
    layer = layers.MoE(EXPERTS, (16, UNITS), dropout=0.5, seed=0, dispatch="blocked")
    x = np.random.default_rng(0).normal(size=(ROWS // 8, FEATURES)).astype("float32")
    x = np.concatenate([x] * 8)
    layer.build(x.shape)
    outputs, state = on_data(layer, x, DataParallel())
    return {
        "outputs": outputs.tolist(),
        "state": state,
        "state of one device": on_data(layer, x, None)[1],
    }


def third_axis() -> dict:
    """Dropout and RowwiseAdagrad on a mesh with an axis of its own for tables.

    Returns:
        The largest difference between replicas of a dense kernel after training, and
        the shape of a device's part of the table's accumulator.
    """

    def build():
        ids = keras.Input((3,), dtype="int32")
        x = keras.layers.Flatten()(keras.layers.Embedding(64, 4, name="table")(ids))
        x = layers.MoE(EXPERTS, (8, 12), dropout=0.5, seed=0, name="moe")(x)
        return keras.Model(ids, keras.layers.Dense(1, name="head")(x))

    sizes = {"batch": 2, "expert": 2, "table": 2}
    active = expert_parallel(build(), sizes, table_axis="table")
    ids = np.random.default_rng(0).integers(0, 64, (32, 3))
    with active.scope():
        model = build()
        model.compile(keras_moe.optimizers.RowwiseAdagrad(1e-2), "mse")
        model.fit(ids, ids[:, :1] / 64, batch_size=16, epochs=2, verbose=0)
        (slot,) = (v for v in model.optimizer.variables if "accumulator" in v.path)
        parts = model.get_layer("head").kernel.value.addressable_shards
        parts = [np.asarray(part.data) for part in parts]
    return {
        "spread": max(float(np.abs(part - parts[0]).max()) for part in parts),
        "accumulator": slot.value.addressable_shards[0].data.shape,
    }


def errors() -> list[str]:
    """Return the messages of invalid arguments."""

    def moe(experts=None):
        count = 6 if experts is None else None
        layer = layers.MoE(count, UNITS if count else None, experts=experts)
        layer.build((None, FEATURES))
        return layer

    dense = [keras.layers.Dense(UNITS) for _ in range(8)]
    separate = keras_moe.experts.LayerExperts(dense)
    built = keras.layers.Dense(1)
    built.build((None, 1))
    ids = keras.Input((), dtype="int32")
    tables = [keras.layers.Embedding(rows, 4)(ids) for rows in (16, 17)]
    two = keras.Model(ids, keras.layers.Concatenate()(tables))
    calls = [
        lambda: expert_parallel(built, {"batch": 4, "expert": 4}),
        lambda: expert_parallel(built, {"batch": 8}),
        lambda: expert_parallel(moe(), {"batch": 2, "expert": 4}),
        lambda: expert_parallel(
            built, {"batch": 8}, expert_axis="batch", batch_size=12
        ),
        lambda: expert_parallel(moe(separate), {"batch": 2, "expert": 4}),
        lambda: expert_parallel(keras.layers.Dense(1), {"batch": 8}),
        lambda: expert_parallel(built, 8),
        lambda: expert_parallel(two, {"batch": 2, "expert": 4}),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def whole_experts() -> list[str]:
    """Return the warnings of a `PLE` whose experts the axis does not divide."""
    ple = layers.PLE(1, 1, 2, UNITS, ["a", "b"])  # 2 * 2 + 1 experts
    ple.build((None, FEATURES))
    shared = layers.MoE(8, UNITS, num_shared_experts=1)  # no warning
    shared.build((None, FEATURES))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = expert_parallel(ple, {"batch": 2, "expert": 4})
        expert_parallel(shared, {"batch": 2, "expert": 4})
    assert not any(any(place.axes) for place in made.placements)
    return [str(w.message) for w in caught]


def split_dispatches(whole: bool) -> dict:
    """Return the differences of `split_dispatch` by mesh, dispatch and form."""

    def on(mesh):
        return lambda experts: distribution(mesh, lambda: experts)

    cases = [
        ("shared", "blocked_evenly", "glu", True),
        ("2 x 4", "ragged", "mlp", False),
        ("data", "ragged", "mlp", True),
    ]
    if whole:
        cases = [
            (mesh, name, kind, weighted)
            for mesh in MESHES
            for name in ("blocked_evenly", "ragged")
            for kind in ("mlp", "glu")
            for weighted in (True, False)
        ]
    found = {
        ", ".join(map(str, case)): split_dispatch.differences(
            case[1], on(case[0]), *case[2:]
        )
        for case in cases
    }
    found["beyond"] = [split_dispatch.rows_beyond(*sizes) for sizes in ((1, 8), (2, 4))]
    found["dropout"] = split_dispatch.dropout(on("shared"))
    return found


def main() -> None:
    whole = "--all" in sys.argv
    jax.config.update("jax_enable_x64", True)
    found = {"split": split_dispatches(whole)}
    for mesh in (None, *(MESHES if whole else ("2 x 4",))):
        found[f"all, 48 rows, {mesh}"] = gradients(mesh)
    for mesh in (None, "data", "shared"):
        found[f"few, 48 rows, {mesh}"] = gradients(mesh, 48, FEW)
    # Eight devices do not divide 45 rows.
    for mesh in (None, *(MESHES if whole else ("2 x 4",))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[f"few, 45 rows, {mesh}"] = gradients(mesh, 45, ("expert_choice",))
        found["warned"] = [str(w.message) for w in caught]
    jax.config.update("jax_enable_x64", False)
    for mesh in (None, *(MESHES if whole else ("shared", "2 x 4"))):
        found[f"fit, {mesh}"] = fitted(mesh)
    found |= {"capacity": capacity(), "dropout": dropout(), "errors": errors()}
    found["whole"] = whole_experts()
    found["third axis"] = third_axis()
    found["planned"] = planned_steps.planned(MESHES)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
