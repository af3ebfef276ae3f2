"""Every layer of keras_moe, in the variants that its contract is held in."""

import keras

from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    CrossStitch,
    DSelectK,
    EPNet,
    GateNU,
    HierarchicalMoE,
    HoME,
    MMoE,
    MoE,
    OMoE,
    PEPNet,
    PPNet,
    SharedBottom,
    SoftMoE,
    Tower,
)
from keras_moe.routers import TopKRouter
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
        "MMoE-sparse",
        MMoE,
        kwargs={"num_experts": 12, "expert_units": (8, 5), "tasks": 2, "top_k": 2},
    ),
    Case(
        "MMoE-joint-budget",
        MMoE,
        kwargs={
            "num_experts": 12,
            "expert_units": (8, 5),
            "tasks": TASKS,
            "shared_top_k": 2,
            "top_k": 1,
            "load_balancing_loss_weight": 0.01,
        },
    ),
    Case("OMoE", OMoE, kwargs={"num_experts": 4, "expert_units": 5, "tasks": TASKS}),
    Case(
        "CGC",
        CGC,
        kwargs={
            "num_shared_experts": 2,
            "num_task_experts": 1,
            "expert_units": (8, 5),
            "tasks": TASKS,
        },
    ),
    Case(
        "PLE",
        PLE,
        kwargs={
            "num_levels": 2,
            "num_shared_experts": 2,
            "num_task_experts": 2,
            "expert_units": (8, 5),
            "tasks": 2,
            "activation": "gelu",
            "dropout": 0.1,
            "gate_units": (7,),
            "gate_dropout": 0.3,
            "gate_temperature": 0.5,
            "gate_use_bias": True,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "seed": 1,
        },
    ),
    Case(
        "PLE-without-task-experts",
        PLE,
        kwargs={
            "num_levels": 2,
            "num_shared_experts": 3,
            "num_task_experts": 0,
            "expert_units": 5,
            "tasks": TASKS,
        },
    ),
    Case(
        "PLE-own-experts",
        lambda **kwargs: PLE(
            2,
            1,
            1,
            None,
            2,
            experts=[MLPExperts(3, (8, 5), "tanh"), GLUExperts(3, 8, 4)],
            **kwargs,
        ),
    ),
    Case(
        "AdaTT",
        AdaTT,
        kwargs={
            "num_levels": 2,
            "num_task_experts": 1,
            "expert_units": (8, 5),
            "tasks": TASKS,
        },
    ),
    Case(
        "AdaTT-shared-experts",
        AdaTT,
        kwargs={
            "num_levels": 2,
            "num_task_experts": 2,
            "expert_units": (8, 5),
            "tasks": 2,
            "num_shared_experts": 2,
            "seed": 1,
        },
    ),
    Case(
        "STEM",
        STEM,
        kwargs={
            "num_shared_experts": 1,
            "num_task_experts": 2,
            "expert_units": (8, 5),
            "tasks": TASKS,
            "num_levels": 2,
        },
    ),
    Case(
        "STEM-task-inputs",
        STEM,
        shapes=((6,), (3, 6)),
        kwargs={
            "num_shared_experts": 2,
            "num_task_experts": 1,
            "expert_units": (8, 5),
            "tasks": TASKS,
        },
    ),
    Case(
        "HoME",
        HoME,
        kwargs={
            "num_shared_experts": 2,
            "num_task_experts": 1,
            "expert_units": (8, 5),
            "tasks": TASKS,
            "groups": [["click", "stay"], ["buy"]],
            "feature_gate_rank": 3,
        },
    ),
    Case(
        "HoME-plain",
        HoME,
        kwargs={
            "num_shared_experts": 1,
            "num_task_experts": 2,
            "expert_units": 5,
            "tasks": 2,
            "expert_normalization": False,
            "feature_gate_rank": 0,
            "self_gate": False,
            "dropout": 0.1,
            "seed": 1,
        },
    ),
    Case("CrossStitch", CrossStitch, kwargs={"units": (8, 5), "tasks": TASKS}),
    Case("CrossStitch-one-task", CrossStitch, kwargs={"units": 5, "tasks": 1}),
    Case(
        "CrossStitch-all-arguments",
        CrossStitch,
        kwargs={
            "units": (8, 5),
            "tasks": 2,
            "self_weight": 0.6,
            "per_unit": True,
            "activation": "gelu",
            "dropout": 0.1,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "seed": 1,
        },
    ),
    Case(
        "DSelectK",
        DSelectK,
        kwargs={"num_experts": 4, "expert_units": (8, 5), "tasks": TASKS},
    ),
    Case(
        "DSelectK-all-arguments",
        DSelectK,
        kwargs={
            "num_experts": 5,
            "expert_units": (8, 5),
            "tasks": 2,
            "top_k": 3,
            "gamma": 0.5,
            "entropy_weight": 0.01,
            "static": True,
            "activation": "gelu",
            "dropout": 0.1,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "seed": 1,
        },
    ),
    Case(
        "DSelectK-gate-inputs",
        DSelectK,
        shapes=((6,), (3,)),
        kwargs={
            "num_experts": 5,
            "expert_units": 5,
            "tasks": TASKS,
            "entropy_weight": 0.01,
        },
    ),
    Case(
        "DSelectK-own-experts",
        lambda **kwargs: DSelectK(
            4, None, TASKS, 1, experts=MLPExperts(4, (8, 5), "tanh"), **kwargs
        ),
    ),
    Case("GateNU", GateNU, kwargs={"units": 5, "hidden_units": 8, "scale": 3.0}),
    Case("EPNet", EPNet, shapes=((6,), (3,))),
    Case("PPNet", PPNet, kwargs={"units": (8, 5), "tasks": TASKS}),
    Case(
        "PPNet-prior-inputs",
        PPNet,
        shapes=((6,), (3,)),
        kwargs={"units": 5, "tasks": 2, "gate_units": 7},
    ),
    Case(
        "PEPNet",
        PEPNet,
        shapes=((6,), (3,)),
        kwargs={"units": (8, 5), "tasks": TASKS},
    ),
    Case(
        "PEPNet-all-arguments",
        PEPNet,
        shapes=((6,), (3,), (4,)),
        kwargs={
            "units": (8, 5),
            "tasks": 2,
            "gate_units": 7,
            "gate_scale": 1.5,
            "activation": "gelu",
            "dropout": 0.1,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "gate_kernel_initializer": keras.initializers.RandomNormal(
                stddev=0.5, seed=3
            ),
            "seed": 1,
        },
    ),
    Case(
        "Tower",
        Tower,
        float32_output=True,
        kwargs={"units": (8, 4), "activation": "sigmoid", "dropout": 0.2, "seed": 5},
    ),
    Case("Tower-linear", Tower, float32_output=True, kwargs={"units": ()}),
    Case(
        "GLUExperts",
        GLUExperts,
        kwargs={"num_experts": 4, "hidden_units": 8, "units": 5, "use_bias": True},
    ),
    Case(
        "LayerExperts",
        lambda **kwargs: LayerExperts(
            [
                keras.layers.Dense(5),
                keras.Sequential(
                    [keras.layers.Dense(8, "tanh"), keras.layers.Dense(5)]
                ),
            ],
            **kwargs,
        ),
    ),
    Case("MoE", MoE, kwargs={"num_experts": 4, "expert_units": (8, 5)}),
    Case(
        "MoE-all-arguments",
        MoE,
        rows_compete=True,
        kwargs={
            "num_experts": 4,
            "expert_units": (8, 5),
            "top_k": 3,
            "activation": "gelu",
            "router": "top_k",
            "dispatch": "capacity",
            "capacity_factor": 1.5,
            "priority": "probability",
            "num_shared_experts": 2,
            "load_balancing_loss_weight": 0.02,
            "router_z_loss_weight": 0.001,
            "importance_loss_weight": 0.03,
            "entropy_loss_weight": 0.005,
            "routing_metrics": ("load_cv", "dropped_fraction"),
            "use_bias": False,
            "dropout": 0.1,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "seed": 1,
        },
    ),
    *[
        Case(
            f"MoE-{router}",
            MoE,
            kwargs={"num_experts": 4, "expert_units": (8, 5), "router": router},
        )
        for router in ("bias_balanced", "sinkhorn", "dense")
    ],
    Case(
        "MoE-expert_choice",
        MoE,
        rows_compete=True,
        kwargs={"num_experts": 4, "expert_units": (8, 5), "router": "expert_choice"},
    ),
    Case(
        "MoE-own-parts",
        lambda **kwargs: MoE(
            4,
            router=TopKRouter(4, 2, score_function="sigmoid"),
            experts=GLUExperts(4, 8, 5),
            **kwargs,
        ),
    ),
    Case(
        "HierarchicalMoE",
        HierarchicalMoE,
        kwargs={"num_groups": 3, "experts_per_group": 2, "expert_units": (8, 5)},
    ),
    Case(
        "SoftMoE",
        SoftMoE,
        shapes=((5, 6),),
        kwargs={"num_experts": 4, "expert_units": (8, 5)},
    ),
    Case(
        "SoftMoE-all-arguments",
        SoftMoE,
        shapes=((5, 6),),
        kwargs={
            "num_experts": 3,
            "expert_units": (8, 5),
            "slots_per_expert": 2,
            "activation": "relu",
            "normalize": False,
            "phi_initializer": keras.initializers.RandomNormal(stddev=0.5, seed=3),
            "dropout": 0.1,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "kernel_regularizer": "l2",
            "seed": 1,
        },
    ),
    Case(
        "SoftMoE-own-experts",
        lambda **kwargs: SoftMoE(
            3, slots_per_expert=2, experts=GLUExperts(3, 8, 5), **kwargs
        ),
        shapes=((5, 6),),
    ),
]
