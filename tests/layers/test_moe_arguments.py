"""Arguments of MoE, good and bad."""

import keras
import pytest

from keras_moe import routers
from keras_moe.experts import GLUExperts, LayerExperts
from keras_moe.layers import MoE
from tests.support import dispatches
from tests.support.moe_layers import E, U


def refused(message, *arguments, **kwargs):
    return pytest.param(arguments, kwargs, message, id=message.replace("`", "")[:40])


def glu(e):
    return GLUExperts(e, 4, U)


def layers_of(e):
    return LayerExperts([keras.layers.Dense(U) for _ in range(e)])


BAD = [
    refused("`num_experts`.*0", 0, U),
    *[
        refused("`top_k` must not exceed.*top_k=5, num_experts=4", E, U, 5,
                router=router)
        for router in (None, "dense", "hash", routers.TopKRouter(E, 2),
                       routers.DenseRouter(E))
    ],
    refused("`top_k` must be None.*'dense'.*top_k=2", E, U, 2, router="dense"),
    refused("`top_k`.*0", E, U, 0, router="dense"),
    refused("`top_k` must be None or equal.*top_k=3, router.top_k=2", E, U, 3,
            router=routers.TopKRouter(E, 2)),
    refused("`expert_units` must be given.*or `experts`", E),
    refused(r"`expert_units\[1\]`", E, (4, 0)),
    refused("`router` must be one of.*'top_k'.*'hash'.*'top-k'", E, U, router="top-k"),
    refused("`router` must route to `num_experts`.*num_experts=4.*num_experts=6", E, U,
            router=routers.TopKRouter(6, 2)),
    refused("`router` must be a layer of keras_moe.routers.*Dense", E, U,
            router=keras.layers.Dense(4)),
    refused("`router` must be one of.*class", E, U, router=routers.TopKRouter),
    refused("`activation` must be the name.*PReLU", E, U,
            activation=keras.layers.PReLU()),
    refused("`dispatch` must be one of.*'split'.*'fast'", E, U, dispatch="fast"),
    *[
        refused(f"`dispatch` must be one of.*ExpertChoiceRouter.*dispatch='{name}'",
                E, U, router="expert_choice", dispatch=name)
        for name in ("split", "blocked", "ragged")
    ],
    refused("`dispatch` must be one of.*DenseRouter.*'capacity'", E, U, router="dense",
            dispatch="capacity"),
    refused("`dispatch` must not be 'blocked'.*LayerExperts", 2, experts=layers_of(2),
            dispatch="blocked"),
    refused("`dispatch` must not be 'ragged'.*LayerExperts", 2, experts=layers_of(2),
            dispatch="ragged"),
    *[
        refused(f"`capacity_factor` needs.*=1.5, dispatch='{name}'", E, U,
                capacity_factor=1.5, dispatch=name)
        for name in ("dense", "split", "blocked", "ragged")
        if name != "ragged" or dispatches.BACKEND == "jax"  # Elsewhere refused first.
    ],
    refused("`capacity_factor` needs.*DenseRouter", E, U, router="dense",
            capacity_factor=1.5),
    refused("`capacity_factor` must be set on", E, U, capacity_factor=1.5,
            router=routers.ExpertChoiceRouter(E, 2)),
    refused("`capacity_factor`.*0", E, U, capacity_factor=0),
    refused("`priority` must be one of.*'first'", E, U, priority="first"),
    *[
        refused(f"`priority` needs.*='probability', dispatch='{name}'", E, U,
                priority="probability", dispatch=name)
        for name in ("auto", "dense", "split", "blocked")
    ],
    refused("`priority` needs.*ExpertChoiceRouter", E, U, priority="probability",
            router="expert_choice", dispatch="capacity"),
    refused("`experts` must be a layer of keras_moe.experts.*Dense", E,
            experts=keras.layers.Dense(U)),
    refused("`num_experts` must be the number.*=4, experts.num_experts=3", E,
            experts=glu(3)),
    refused("`expert_units` must be None.*`experts`.*8", E, 8, experts=glu(E)),
    refused("`num_shared_experts`.*-1", E, U, num_shared_experts=-1),
    refused("`num_shared_experts` needs.*=1.*LayerExperts", 2, experts=layers_of(2),
            num_shared_experts=1),
    refused("`load_loss_weight` must be 0.*TopKRouter.*=0.1", E, U,
            load_loss_weight=0.1),
    refused("`load_balancing_loss_weight` must be 0.*HashRouter", E, U, router="hash",
            load_balancing_loss_weight=0.1),
    refused("`router_z_loss_weight` must be a finite number.*nan", E, U,
            router_z_loss_weight=float("nan")),
    refused("`routing_metrics` must not hold.*router_entropy.*HashRouter", E, U,
            router="hash", routing_metrics=["router_entropy"]),
    refused("must.*'load'.*", E, U, routing_metrics=["load"]),
    refused("`dropout`.*1", E, U, dropout=1),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kwargs", "message"), BAD)
def test_bad_arguments_are_named(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoE(*arguments, **kwargs)


def test_top_k_comes_from_a_given_router():
    router = routers.TopKRouter(E, 3)
    assert MoE(E, U, router=router).top_k == 3
    assert MoE(E, U, 3, router=routers.TopKRouter(E, 3)).top_k == 3
    assert MoE(E, U).top_k == 2
