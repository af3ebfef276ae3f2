"""Routers by name, tokens for them, and their records as arrays."""

import keras
import numpy as np
from keras import ops

from keras_moe import routers

# The arguments of a hierarchical router are others, hence it is not among the known.
ALL = [*routers.KNOWN, "hierarchical"]
WITH_KERNEL = [name for name in ALL if name != "hash"]
MASK = np.array([True, True, False, True, True, False, True])


def make(kind, num_experts=4, **kwargs):
    if kind == "hierarchical":
        kwargs = {"top_k_groups": 2, "top_k_experts": 1, **kwargs}
        return routers.HierarchicalRouter(2, num_experts // 2, **kwargs)
    if kind != "dense":
        kwargs.setdefault("top_k", 2)
    return routers.KNOWN[kind](num_experts, **kwargs)


def tokens(n=7, d=5):
    return np.random.default_rng(0).normal(size=(n, d)).astype("float32")


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def arrays(record):
    """The fields of a record that are not None."""
    found = {name: v for name, v in record._asdict().items() if v is not None}
    return {name: array(v) for name, v in found.items()}


def on_logits(router):
    """Give the router the identity as its kernel, so that tokens are logits."""
    router.build((None, router.num_experts))
    router.kernel.assign(np.eye(router.num_experts))
    return router


@keras.saving.register_keras_serializable("tests")
class Fields(keras.layers.Layer):
    """A router whose record comes as a list, for compilers, files and gradients."""

    def __init__(self, router, training=False, mask=None, floats=False, **kwargs):
        super().__init__(dtype=router.dtype_policy, **kwargs)
        self.router, self.training = router, training
        self.mask, self.floats = mask, floats

    def build(self, input_shape):
        if not self.router.built:
            self.router.build(input_shape)

    def call(self, x):
        record = self.router(x, mask=self.mask, training=self.training)
        fields = [v for v in record if v is not None]
        if not self.floats:
            return fields
        return [v for v in fields if keras.backend.is_float_dtype(v.dtype)]

    def get_config(self):
        router = keras.saving.serialize_keras_object(self.router)
        return {"name": self.name, "router": router, "training": self.training}

    @classmethod
    def from_config(cls, config):
        router = keras.saving.deserialize_keras_object(config.pop("router"))
        return cls(router, **config)


def with_random_weights(router, d=5):
    rng = np.random.default_rng(1)
    router.build((None, d))
    values = [rng.normal(size=w.shape) for w in router.trainable_variables]
    for variable, value in zip(router.trainable_variables, values, strict=True):
        variable.assign(value)
    return values


def feed(name, n=7):
    return np.arange(n).astype("int32")[:, None] if name == "hash" else tokens(n)


def model_of(router, x):
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    return keras.Model(inputs, Fields(router)(inputs))


def takes_unknown_n(name):
    return name != "expert_choice" or keras.backend.backend() == "tensorflow"


def assert_equal(found, expected, **tolerance):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(a), array(b), **tolerance)
