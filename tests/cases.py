"""Every layer of keras_moe, in the variants that its contract is held in."""

import keras

from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import (
    HierarchicalMoE,
    MMoE,
    MoE,
    SharedBottom,
    SoftMoE,
    Tower,
)
from tests.contracts import Case

TASKS = ["click", "buy", "stay"]

CASES = [
    Case("MLPExperts", MLPExperts, kwargs={"num_experts": 4, "units": (8, 5)}),
    Case(
        "MLPExperts-one-layer",
        MLPExperts,
        kwargs={"num_experts": 3, "units": 5, "use_bias": False, "dropout": 0.5},
    ),
    Case("SharedBottom", SharedBottom, kwargs={"units": (8, 5), "tasks": TASKS}),
    Case("MMoE", MMoE, kwargs={"num_experts": 4, "expert_units": 5, "tasks": TASKS}),
    Case(
        "MMoE-all-arguments",
        MMoE,
        kwargs={
            "num_experts": 4,
            "expert_units": (8, 5),
            "tasks": 2,
            "top_k": 3,
            "gate_units": (7,),
            "gate_temperature": 0.5,
            "gate_dropout": 0.3,
            "gate_use_bias": True,
            "dropout": 0.1,
            "activation": "gelu",
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "gate_kernel_initializer": keras.initializers.RandomNormal(
                stddev=0.5, seed=3
            ),
            "seed": 1,
        },
    ),
    Case(
        "MMoE-gate-inputs",
        MMoE,
        shapes=((6,), (3,)),
        kwargs={"num_experts": 4, "expert_units": 5, "tasks": TASKS},
    ),
    Case(
        "MMoE-own-experts",
        lambda **kwargs: MMoE(
            4, None, TASKS, experts=MLPExperts(4, (8, 5), "tanh"), **kwargs
        ),
    ),
    Case(
        "Tower",
        Tower,
        float32_output=True,
        kwargs={"units": (8, 4), "activation": "sigmoid", "dropout": 0.2, "seed": 5},
    ),
    Case("Tower-linear", Tower, float32_output=True, kwargs={"units": ()}),
]
