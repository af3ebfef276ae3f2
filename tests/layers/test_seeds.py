"""One seeded initializer for all weights of a layer: no two of them are equal."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import routers
from keras_moe.experts import GLUExperts, MLPExperts
from keras_moe.initializers import independent
from keras_moe.layers import CGC, MMoE, MoE, PartitionedNormalization
from tests.contracts import Case
from tests.support.layer_cases import CASES

# All widths are 6, so that equal draws would have equal shapes too.
WIDTH = 6
SEEDED = keras.initializers.RandomNormal(seed=0)


def _initializers(kind):
    """Return every initializer that a layer takes, by the name of the argument."""
    names = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return {name: SEEDED for name in names if name.endswith("initializer")}


def _everything_seeded(router):
    options = {**_initializers(router), "use_bias": True}
    if router is routers.HierarchicalRouter:
        return router(2, WIDTH, **options)
    return router(WIDTH, **options)


def _moe(router):
    def make(**kwargs):
        return MoE(
            num_experts=2 * WIDTH if router is routers.HierarchicalRouter else WIDTH,
            expert_units=(WIDTH, WIDTH),
            router=_everything_seeded(router),
            num_shared_experts=2,
            **kwargs,
        )

    return make


def _of_given_experts(experts):
    def make(**kwargs):
        return MoE(
            WIDTH,
            router=_everything_seeded(routers.TopKRouter),
            experts=experts(),
            num_shared_experts=2,
            **kwargs,
        )

    return make


MORE = [
    Case(
        f"MoE-{router.__name__}",
        _moe(router),
        kwargs={"kernel_initializer": SEEDED},
    )
    for router in (
        routers.TopKRouter,
        routers.NoisyTopKRouter,
        routers.BiasBalancedRouter,
        routers.ExpertChoiceRouter,
        routers.SinkhornRouter,
        routers.DenseRouter,
        routers.HierarchicalRouter,
    )
] + [
    Case(
        "MoE-MLPExperts",
        _of_given_experts(
            lambda: MLPExperts(WIDTH, (WIDTH, WIDTH), **_initializers(MLPExperts))
        ),
    ),
    Case(
        "MoE-GLUExperts",
        _of_given_experts(
            lambda: GLUExperts(WIDTH, WIDTH, use_bias=True, **_initializers(GLUExperts))
        ),
    ),
    # The gates are as wide as experts that have the seed without the layer's knowledge.
    Case(
        "MMoE-given-experts",
        lambda **kwargs: MMoE(
            WIDTH,
            None,
            2,
            experts=MLPExperts(WIDTH, (WIDTH, WIDTH), kernel_initializer=SEEDED),
            gate_units=(WIDTH,),
            gate_kernel_initializer=SEEDED,
        ),
    ),
    Case(
        "CGC-as-wide-as-experts",
        lambda **kwargs: CGC(
            3,
            3,
            (WIDTH, WIDTH),
            2,
            kernel_initializer=SEEDED,
            gate_units=(WIDTH,),
            gate_kernel_initializer=SEEDED,
        ),
    ),
]


def _slices(weight):
    """Return the matrices and vectors of a weight, however it is stacked."""
    if weight.ndim <= 2:
        return [weight]
    return [part for stacked in weight for part in _slices(stacked)]


# A layer whose weights all start as constants has no draws.
DRAWN = [case for case in CASES if case.make is not PartitionedNormalization]


@pytest.mark.parametrize("case", [*DRAWN, *MORE], ids=lambda case: case.name)
def test_no_two_weights_come_from_one_draw(case):
    """No three neighbours stand twice in what the seed has drawn.

    Triples find a draw that is a part of a longer one, as a bias would be of a kernel.
    """
    make = case.make
    given = {}
    if inspect.isclass(make):
        given = {k: v for k, v in _initializers(make).items() if k in case.kwargs}
        known = inspect.signature(make.__init__).parameters
        if "kernel_initializer" in known or "kwargs" in known:
            given = _initializers(make)
    layer = make(**{**case.kwargs, **given})
    layer.build(*[(2, *shape) for shape in case.shapes])
    seen = {}
    for variable in layer.weights:
        value = ops.convert_to_numpy(variable)
        for part in _slices(np.asarray(value)):
            flat = part.ravel()
            if np.ptp(flat) == 0 or not np.issubdtype(flat.dtype, np.floating):
                continue  # A constant, which two weights may share.
            if "/stitch_" in variable.path or "/balance_logits" in variable.path:
                continue  # A constant matrix.
            for start in range(len(flat) - 2):
                triple = tuple(flat[start : start + 3].tolist())
                assert triple not in seen, (variable.path, seen[triple])
                seen[triple] = variable.path
    assert seen


def test_keys_of_all_lengths_draw_apart():
    """A zero at the end of a key had no effect: (0,) drew what (0, 0) did."""
    keys = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (0, 2), (2,), (1, 1)]
    draws = {
        key: tuple(ops.convert_to_numpy(independent(SEEDED, *key)((3,))).tolist())
        for key in keys
    }
    assert len(set(draws.values())) == len(keys)
    again = ops.convert_to_numpy(independent(SEEDED, 0, 1)((3,)))
    assert draws[0, 1] == tuple(again.tolist())
