"""`routers.get`: by name, class, config and object."""

import keras
import pytest

from keras_moe import routers


@pytest.mark.parametrize("name", routers.KNOWN)
def test_get_makes_a_router_by_its_name(name):
    defaults = {"num_experts": 4, "top_k": 2, "seed": 3, "capacity_factor": 1.5}
    router = routers.get(name, **defaults, name="given", dtype="float64")
    assert type(router) is routers.KNOWN[name]
    assert router.num_experts == 4
    assert router.top_k == (4 if name == "dense" else 2)
    assert (router.name, router.dtype_policy.name) == ("given", "float64")
    for argument in ("seed", "capacity_factor"):
        assert getattr(router, argument, None) in (None, defaults[argument])


def test_get_takes_a_class_a_config_and_an_object():
    router = routers.get(routers.HierarchicalRouter, num_groups=2, experts_per_group=3)
    assert router.num_experts == 6
    assert routers.get(router, num_experts=9) is router
    again = routers.get(keras.saving.serialize_keras_object(router))
    assert type(again) is type(router)
    assert again.get_config() == router.get_config()


@pytest.mark.parametrize(
    "value",
    [None, "top-k", 3, keras.layers.Dense, keras.layers.Dense(4), lambda x: x],
    ids=["None", "misspelt", "number", "class", "layer", "function"],
)
def test_get_rejects_other_values(value):
    message = r"`identifier` must be one of.*'top_k'.*Received: identifier="
    with pytest.raises(ValueError, match=message):
        routers.get(value, num_experts=4)


def test_get_rejects_arguments_that_no_router_has():
    with pytest.raises((TypeError, ValueError), match="topk"):
        routers.get("top_k", num_experts=4, topk=2)
    with pytest.raises(ValueError, match="`top_k` must not exceed"):
        routers.get("top_k", num_experts=4, top_k=5)
