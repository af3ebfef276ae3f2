"""Arguments that layers have in common: number of experts, tasks, dispatch, names."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.experts import LayerExperts, MLPExperts
from keras_moe.layers import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    CrossStitch,
    DSelectK,
    HoME,
    MMoE,
    MoE,
    OMoE,
    PEPNet,
    PPNet,
    SharedBottom,
    SoftMoE,
)
from keras_moe.routers import TopKRouter

TASKS = ["click", "buy"]
X = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")


def _experts(count=4):
    return LayerExperts([keras.layers.Dense(3) for _ in range(count)])


@pytest.mark.parametrize("layer", [MMoE, OMoE, DSelectK])
def test_given_experts_are_enough(layer):
    made = layer(tasks=TASKS, experts=_experts())
    assert made.num_experts == 4
    assert {task: y.shape for task, y in made(X).items()} == {
        "click": (4, 3),
        "buy": (4, 3),
    }
    copy = layer.from_config(made.get_config())
    assert copy.num_experts == 4


def test_given_experts_or_a_given_router_are_enough_for_one_output():
    assert MoE(experts=_experts())(X).shape == (4, 3)
    assert MoE(router=TopKRouter(4, 1), expert_units=3).num_experts == 4
    soft = SoftMoE(experts=MLPExperts(4, 3))
    assert soft(X[None]).shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("layer", "levels", "count"),
    [
        (PLE, {"num_levels": 2, "num_shared_experts": 1, "num_task_experts": 1}, 3),
        (CGC, {"num_shared_experts": 2, "num_task_experts": 1}, 4),
        (AdaTT, {"num_levels": 2, "num_task_experts": 2}, 4),
        (STEM, {"num_shared_experts": 1, "num_task_experts": 1}, 3),
    ],
)
def test_given_experts_need_no_units(layer, levels, count):
    experts = [_experts(count) for _ in range(levels.get("num_levels", 1))]
    made = layer(**levels, tasks=TASKS, experts=experts)
    assert made(X)["buy"].shape == (4, 3)


@pytest.mark.parametrize("layer", [MMoE, OMoE, DSelectK])
def test_no_number_of_experts_is_an_error(layer):
    with pytest.raises(ValueError, match="`num_experts` must be given, or `experts`"):
        layer(expert_units=3, tasks=TASKS)


@pytest.mark.parametrize("layer", [MoE, SoftMoE])
def test_no_number_of_experts_is_an_error_for_one_output(layer):
    with pytest.raises(ValueError, match="`num_experts` must be given, or `experts`"):
        layer(expert_units=3)


def test_experts_without_a_number_need_one():
    experts = keras.layers.Lambda(lambda x: x[:, None, :] * np.ones((1, 2, 1)))
    with pytest.raises(ValueError, match="`num_experts` must be given"):
        MMoE(tasks=TASKS, experts=experts)
    assert MMoE(2, tasks=TASKS, experts=experts).num_experts == 2


@pytest.mark.parametrize(
    "layer",
    [
        lambda tasks: MMoE(num_experts=2, expert_units=3, tasks=tasks),
        lambda tasks: PLE(
            num_levels=1,
            num_shared_experts=1,
            num_task_experts=1,
            expert_units=3,
            tasks=tasks,
        ),
        lambda tasks: SharedBottom(3, tasks),
        lambda tasks: CrossStitch(3, tasks),
        lambda tasks: DSelectK(num_experts=2, expert_units=3, tasks=tasks),
        lambda tasks: HoME(
            num_shared_experts=1, num_task_experts=1, expert_units=3, tasks=tasks
        ),
        lambda tasks: PPNet(3, tasks),
        lambda tasks: PEPNet(3, tasks),
    ],
    ids=["mmoe", "ple", "bottom", "stitch", "dselect_k", "home", "ppnet", "pepnet"],
)
def test_tasks_are_the_keys_of_the_outputs(layer):
    assert layer(TASKS).tasks == ("click", "buy")
    assert layer(iter(TASKS)).tasks == ("click", "buy")
    assert layer(2).tasks == (0, 1)
    with pytest.raises(ValueError, match="`tasks` must be a number of tasks or a seq"):
        layer(None)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: MoE(num_experts=4, expert_units=3),
        lambda: layers.HierarchicalMoE(2, 2, expert_units=3),
        lambda: MMoE(num_experts=4, expert_units=3, tasks=TASKS, top_k=1),
        lambda: OMoE(num_experts=4, expert_units=3, tasks=TASKS, top_k=1),
    ],
    ids=["moe", "hierarchical_moe", "mmoe", "omoe"],
)
def test_a_dispatch_can_be_changed_and_is_checked(layer):
    layer = layer()
    outputs = keras.tree.map_structure(keras.ops.convert_to_numpy, layer(X))
    layer.dispatch = "dense"
    assert layer.dispatch == "dense"
    for now, before in zip(
        keras.tree.flatten(layer(X)), keras.tree.flatten(outputs), strict=True
    ):
        np.testing.assert_allclose(now, before, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`dispatch` must be one of"):
        layer.dispatch = "sparse"
    assert layer.dispatch == "dense"


def test_a_dispatch_without_top_k_is_an_error_also_later():
    layer = MMoE(num_experts=4, expert_units=3, tasks=TASKS)
    with pytest.raises(ValueError, match=r"with top_k=None.*'split'"):
        layer.dispatch = "split"


def test_the_old_name_of_the_entropy_loss_weight():
    layer = DSelectK(4, 3, TASKS, entropy_weight=0.5)
    assert layer.get_config()["entropy_loss_weight"] == 0.5
    assert "entropy_weight" not in layer.get_config()


@pytest.mark.parametrize("layer", [SharedBottom, CrossStitch, PPNet, PEPNet])
def test_layers_of_mlps_take_the_same_arguments(layer):
    options = {
        "activation": "tanh",
        "use_bias": False,
        "dropout": 0.25,
        "kernel_initializer": "he_normal",
        "kernel_regularizer": "l2",
        "seed": 3,
    }
    made = layer((4, 3), TASKS, **options, name="mine", dtype="float64")
    config = layer.from_config(made.get_config()).get_config()
    for name in ("activation", "use_bias", "dropout", "seed", "units"):
        assert config[name] == {**options, "units": (4, 3)}[name]
    assert config["kernel_initializer"]["class_name"] == "HeNormal"
    assert config["kernel_regularizer"]["class_name"] == "L2"
    assert (made.name, made.compute_dtype) == ("mine", "float64")
    with pytest.raises(ValueError, match="`use_bias` must be True or False"):
        layer(3, TASKS, use_bias="yes")
