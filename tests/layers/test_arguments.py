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
    dense = keras.tree.map_structure(keras.ops.convert_to_numpy, layer(X))
    for now, before in zip(
        keras.tree.flatten(dense), keras.tree.flatten(outputs), strict=True
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


def _reloaded(layer, tmp_path):
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    return model, keras.models.load_model(tmp_path / "model.keras")


def _dense_with_a_factor():
    layer = MoE(4, 3, dispatch="dense")
    layer.capacity_factor = 2.0
    return layer


def _priority_without_a_factor():
    layer = MoE(4, 3, capacity_factor=0.5, priority="probability")
    layer.capacity_factor = None
    return layer


def _factor_of_the_router():
    layer = MoE(4, 3, router="expert_choice", capacity_factor=0.5)
    layer.capacity_factor = 1.5
    assert layer.router.capacity_factor == 1.5
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        _dense_with_a_factor,
        _priority_without_a_factor,
        _factor_of_the_router,
        lambda: MoE(4, np.array([6, 3])),
        lambda: MMoE(4, range(6, 3, -1), 1),
        lambda: PLE(1, 1, 1, (u for u in (6, 3)), 1),
    ],
    ids=["dense", "priority", "expert_choice", "array", "range", "generator"],
)
def test_what_can_be_set_can_be_saved_and_loaded(layer, tmp_path):
    model, loaded = _reloaded(layer(), tmp_path)
    for found, expected in zip(
        keras.tree.flatten(loaded(X)), keras.tree.flatten(model(X)), strict=True
    ):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(found),
            keras.ops.convert_to_numpy(expected),
            rtol=1e-6,
        )


@pytest.mark.parametrize("layer", [MMoE, DSelectK])
def test_a_list_of_experts_is_to_be_wrapped(layer):
    with pytest.raises(ValueError, match=r"`experts` must be one layer: wrap several"):
        layer(tasks=TASKS, experts=[keras.layers.Dense(3), keras.layers.Dense(3)])


def test_experts_and_a_router_of_other_sizes_are_named():
    with pytest.raises(ValueError, match=r"experts.num_experts=4, router.num_exp.*=8"):
        MoE(experts=_experts(4), router=TopKRouter(8, 2))


def test_home_makes_its_own_experts():
    with pytest.raises(ValueError, match="`experts` must be None: HoME makes its own"):
        HoME(1, 1, tasks=TASKS, experts=_experts())
    with pytest.raises(ValueError, match="`expert_units` must be given"):
        HoME(1, 1, tasks=TASKS)


@pytest.mark.parametrize("layer", [MoE, MMoE, DSelectK])
def test_a_wrong_width_is_that_of_the_layer_itself(layer):
    options = {} if layer is MoE else {"tasks": TASKS}
    made = layer(num_experts=4, expert_units=3, name="mine", **options)
    made(X)
    with pytest.raises(ValueError, match=r"`inputs` of the layer .mine. is incomp"):
        made(X[:, :4])


@pytest.mark.parametrize("seed", ["abc", 1.5, True])
def test_a_seed_is_an_integer(seed):
    for layer in (MLPExperts, lambda units, **kw: MMoE(2, units, TASKS, **kw)):
        with pytest.raises(ValueError, match="`seed` must be an integer or None"):
            layer(3, units=3, seed=seed) if layer is MLPExperts else layer(3, seed=seed)
    assert MMoE(2, 3, TASKS, seed=np.int64(3)).seed == 3


def test_a_layer_as_a_router_needs_its_kind_of_choice_alone():
    class FirstTwo(keras.layers.Layer):
        choice, num_experts, top_k = "token", 4, 2

        def call(self, tokens, mask=None, training=None):
            return TopKRouter(4, 2, kernel_initializer="zeros")(tokens, mask=mask)

    assert MoE(router=FirstTwo(), expert_units=3).loss_weights == {}


def test_experts_of_slots_alone_are_computed_densely_where_rows_are_split():
    class Slots(keras.layers.Layer):
        num_experts = 2

        def call(self, inputs):
            return keras.ops.stack([inputs, 2.0 * inputs], axis=-2)

        def on_slots(self, slots, training=None):
            return keras.ops.stack([slots[0], 2.0 * slots[1]])

    layer = MoE(experts=Slots(), top_k=1)
    assert layer(X).shape == X.shape
