"""Compiled steps on eight devices beside `keras_moe.distribution.plan`.

Part of `tests.support.distributed_suite`.
"""

import jax
import keras

import keras_moe
from keras_moe import layers
from keras_moe.distribution import expert_parallel
from tests.benchmarks import collectives


def planned(meshes) -> dict:
    """Return compiled figures beside those of the plan, by model and mesh.

    Each of "weights", "sent" and "flops" has the compiled and the planned one; "share"
    the FLOPs of a device against those of one device alone / 8, by mesh.
    """
    rows, features = 4096, 128
    x = keras.Input((features,), dtype="float32")
    tasks = layers.MMoE(8, (256, 64), 2, dtype="float32")(x)
    models = {
        "evenly": collectives.mixture("blocked_evenly", features, 256),
        "expert_choice": collectives.mixture("expert_choice", features, 256),
        "mmoe": keras.Model(x, keras.layers.Concatenate(dtype="float32")(tasks)),
    }
    found = {"share": {}}
    for case, mesh in [
        ("evenly", "data"),
        ("evenly", "shared"),
        ("evenly", "2 x 4"),
        ("expert_choice", "2 x 4"),
        ("mmoe", "shared"),
        ("mmoe", "2 x 4"),
    ]:
        model = models[case]
        sizes, axis = meshes[mesh]
        strategy = ("data", "experts")[axis is not None]
        step = compiled(model, collectives.distribution(model, sizes, axis), rows)
        plans = keras_moe.distribution.plan(
            model,
            8,
            rows,
            bandwidth=1e9,
            flops=1e9,
            expert_devices=sizes.get("expert", 8),
        )
        (plan,) = (plan for plan in plans if plan.strategy == strategy)
        inputs = rows // sizes["batch"] * features * 4
        found[f"{case}, {mesh}"] = {
            "weights": [step.arguments - inputs, plan.weight_bytes],
            "sent": [step.sent, sum(plan.communication_bytes.values())],
            "flops": [step.flops, plan.flops],
        }
        if case == "evenly":
            found["share"][mesh] = step.flops
    found["table"] = {"sent": planned_table()}
    alone = compiled(models["evenly"], None, rows).flops / 8
    found["share"] = {mesh: flops / alone for mesh, flops in found["share"].items()}
    return found


def compiled(model, active, rows):
    program = collectives.compiled_step(model, active, (rows, model.input_shape[-1]))
    return collectives.summarized(program)


def planned_table() -> list[float]:
    """Return the bytes sent for a table whose rows are split, compiled and planned."""
    ids = keras.Input((4,), dtype="int32")
    hidden = keras.layers.Flatten()(keras.layers.Embedding(65536, 32)(ids))
    model = keras.Model(ids, keras.layers.Dense(1)(hidden))
    active = expert_parallel(model, {"batch": 8}, expert_axis="batch")
    keras.distribution.set_distribution(active)

    def placed(shape, dtype, layout):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)

    weights = [
        placed(v.shape, v.dtype, active.get_variable_layout(v)) for v in model.weights
    ]
    x = placed((2048, 4), "int32", active.get_data_layout((2048, 4)))
    gradient = jax.jit(
        jax.grad(lambda w, x: (model.stateless_call(w, [], x)[0] ** 2).mean()),
        out_shardings=[w.sharding for w in weights],
    )
    step = collectives.summarized(gradient.lower(weights, x).compile())
    keras.distribution.set_distribution(None)
    plan = keras_moe.distribution.plan(
        model, 8, 2048, bandwidth=1e9, flops=1e9, ids_per_row=4
    )[-1]
    return [step.sent, sum(plan.communication_bytes.values())]
