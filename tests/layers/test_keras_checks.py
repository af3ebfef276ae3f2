"""Keras' own checks of a layer, run over every public layer, routers included."""

import inspect

import keras
import pytest
from keras.src.testing import test_case

import keras_moe.experts
import keras_moe.layers
import keras_moe.multitask
from keras_moe import routers
from keras_moe.convert import _gated_shared_moe
from keras_moe.multitask import weighting
from tests.contracts import ROWS, Case
from tests.support.layer_cases import CASES

ROUTERS = [
    Case("TopKRouter", routers.TopKRouter, kwargs={"num_experts": 4}),
    Case(
        "TopKRouter-all-arguments",
        routers.TopKRouter,
        kwargs={
            "num_experts": 4,
            "top_k": 3,
            "score_function": "sigmoid",
            "renormalize": False,
            "jitter": 0.1,
            "use_bias": True,
            "seed": 1,
        },
    ),
    Case("NoisyTopKRouter", routers.NoisyTopKRouter, kwargs={"num_experts": 4}),
    Case("BiasBalancedRouter", routers.BiasBalancedRouter, kwargs={"num_experts": 4}),
    Case("ExpertChoiceRouter", routers.ExpertChoiceRouter, kwargs={"num_experts": 4}),
    Case("SinkhornRouter", routers.SinkhornRouter, kwargs={"num_experts": 4}),
    Case(
        "HierarchicalRouter",
        routers.HierarchicalRouter,
        kwargs={"num_groups": 3, "experts_per_group": 2},
    ),
    Case("DenseRouter", routers.DenseRouter, kwargs={"num_experts": 4}),
    Case(
        "HashRouter",
        routers.HashRouter,
        shapes=((),),
        kwargs={"num_experts": 4, "vocabulary_size": 10},
    ),
]
WEIGHTINGS = [
    Case(kind.__name__, kind, shapes=((),), kwargs=kwargs, float32_output=True)
    for kind, kwargs in (
        (weighting.DWA, {"steps": 2}),
        (
            weighting.DecayingWeighting,
            {"weights": [1.0] * ROWS, "decay": [0.5] * ROWS, "steps": 2},
        ),
        (weighting.FAMO, {}),
        (weighting.FixedWeighting, {"weights": [0.5] * ROWS}),
        (weighting.RLW, {"seed": 1}),
        (weighting.UncertaintyWeighting, {}),
    )
]
# Base classes, a model, and a layer of square matrices.
OTHERS = {"MultiTaskModel", "Router", "StackedKernels", "LossWeighting", "GradNorm"}
# Keras' test feeds arrays; tests/multitask feeds these dicts.
OF_DICTS = {"AITM", "DBMTL", "ESCM2", "ESMM", "NaiveConversion"}


# Keras' own training warns of these: it shuffles a generator, and trains a router by
# outputs that are integers, or a layer whose outputs sum to a constant.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize(
    "case", [*CASES, *ROUTERS, *WEIGHTINGS], ids=lambda case: case.name
)
def test_run_layer_test_of_keras(case):
    backend = keras.backend.backend()
    if backend == "jax" and "-" in case.name:
        pytest.skip("compiled for seconds; the case without these arguments is checked")
    layer = case.layer()
    shapes = [(ROWS, *shape) for shape in case.shapes]
    ids = isinstance(layer, routers.HashRouter)
    dtypes = ["int32"] if ids else case.dtypes
    outputs = layer(
        *[
            keras.Input(batch_shape=shape, dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
    )
    options = {}
    if ids:
        options["input_dtype"] = "int32"
        options["run_training_check"] = False  # Nothing in it is trained.
    inputs = shapes[0]
    if len(shapes) > 1:
        # Keras checks no training of layers with several inputs.
        names = list(inspect.signature(layer.call).parameters)
        inputs = {f"{n}_shape": s for n, s in zip(names, shapes, strict=False)}
        if case.scenarios:
            options["input_dtype"] = dict(zip(inputs, dtypes, strict=True))
        options["run_training_check"] = False
    if isinstance(layer, weighting.LossWeighting):
        options["run_training_check"] = False  # It has no batch.
    if case.float32_output:
        options["run_mixed_precision_check"] = False  # The contract has its own.
    if backend == "jax":
        options["run_mixed_precision_check"] = False  # `test_dtype_policy` compiles it.
    if backend == "tensorflow" and isinstance(outputs, list):
        options["run_training_check"] = False  # Its generator takes no list as labels.
    seeds = len(test_case.get_seed_generators(layer))
    if backend == "torch" and len(layer.variables) > len(layer.weights) + seeds:
        pytest.skip("Keras expects a torch layer to have weights and seeds alone")
    test_case.TestCase("run_layer_test").run_layer_test(
        case.make, case.kwargs, input_shape=inputs, supports_masking=True, **options
    )


def test_every_public_layer_is_checked():
    known = {
        name
        for module in (
            keras_moe.layers,
            keras_moe.experts,
            keras_moe.routers,
            keras_moe.multitask,
            weighting,
            _gated_shared_moe,
        )
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, keras.layers.Layer)
        and value.__module__.startswith("keras_moe.")
        and not name.startswith("_")
    }
    checked = {type(case.layer()).__name__ for case in (*CASES, *ROUTERS, *WEIGHTINGS)}
    assert known - OTHERS - OF_DICTS - {"Layer"} == checked
