"""Values of arguments, as source text: right ones by name, and wrong kinds for all.

Text is what a report prints and what a case is repeated with. `value` makes a new
object of it each time: two layers of a test never share a part.
"""

from __future__ import annotations

import decimal
import fractions
from typing import Any

import keras
import keras_rs
import numpy as np
from keras import ops

import keras_moe
from keras_moe import experts, layers, metrics, multitask, routers
from keras_moe.multitask import gradients, heads, weighting

NAMES = {
    **{name: getattr(layers, name) for name in layers.__all__},
    **{name: getattr(experts, name) for name in experts.__all__},
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
    "keras": keras,
    "keras_moe": keras_moe,
    "keras_rs": keras_rs,
    "np": np,
    "ops": ops,
    "metrics": metrics,
    "multitask": multitask,
    "gradients": gradients,
    "heads": heads,
    "weighting": weighting,
    "routers": routers,
    "Tower": layers.Tower,
    "inf": float("inf"),
    "nan": float("nan"),
}


def value(text: str) -> Any:
    """Return a new object."""
    return eval(text, dict(NAMES))


# The wrong kinds; some of them are right for some arguments.
ANY = [
    *("None", "True", "False", "nan", "inf", "-inf", "-1", "0", "1", "2", "2.5"),
    *("0.5", "10**40", "2**31", "2**63", "1e300", "1e-300", "1e-45", "1j"),
    *("''", "'x'", "'a/b'", "'\\ud800'", "'\\n'", "b'x'", "bytearray(b'xy')"),
    *("np.array(3)", "np.array([8, 5])", "np.ones((2, 2))", "np.array(['a', 'b'])"),
    *("np.int64(3)", "np.float32(0.5)", "np.float16(2)", "np.bool_(True)"),
    *("np.str_('relu')", "np.array([])", "np.datetime64('2020-01-01')"),
    *("{3, 5}", "{'a', 'b'}", "{}", "{'a': 1}", "{'class_name': 'Dense'}"),
    "{'class_name': 'Dense', 'config': {'units': 2}, 'module': 'keras.layers'}",
    *("[]", "()", "[[]]", "[None]", "[3, -1]", "[nan]", "['a', 'a']", "['a b']"),
    *("['a', 'b']", "[True]", "(0,)", "(8, 5)", "[2.0]", "'ab'", "range(3)"),
    *("(i for i in (8, 5))", "iter([])", "(c for c in ('a', 'b'))", "slice(3)"),
    *("lambda x: x", "len", "int", "object()", "Decimal('0.5')", "Fraction(1, 2)"),
    *("ops.convert_to_tensor(3)", "ops.convert_to_tensor([0.5, 2.0])"),
    *("keras.Variable(1.0)", "keras.KerasTensor((None, 6))", "NotImplemented", "..."),
    *("keras.layers.Dense(3)", "keras.layers.Dense", "keras.initializers.HeNormal()"),
    *("keras.initializers.HeNormal", "keras.regularizers.L2()", "keras.losses.Loss"),
    *("keras.losses.MeanSquaredError()", "keras.metrics.Mean()", "MLPExperts(4, 5)"),
    *("keras.optimizers.Adam()", "keras.random.SeedGenerator(1)", "keras.Input((6,))"),
    *("keras.optimizers.schedules.CosineDecay(0.1, 9)", "routers.TopKRouter(4, 2)"),
    *(
        "heads.Binary()",
        "multitask.Task('a')",
        "weighting.DWA(3)",
        "keras.Sequential([keras.layers.Dense(5)])",
    ),
]

_INT = ["2", "1", "3", "np.int64(2)", "np.int32(1)"]
_FLAG = ["True", "False", "np.bool_(True)"]
_RATE = ["0.1", "0.0", "0.5", "0", "np.float32(0.25)"]
_POSITIVE = ["1.0", "0.5", "2", "np.float32(0.5)", "1e-6", "Fraction(1, 2)"]
_UNITS = [
    *("(8, 5)", "5", "[5]", "np.array([8, 5])", "range(4, 6)", "np.int64(4)"),
    "(u for u in (8, 5))",
]
_INITIALIZER = [
    *("'glorot_uniform'", "'zeros'", "'HeNormal'", "keras.initializers.HeNormal(3)"),
    *("keras.initializers.HeNormal", "None", "keras.initializers.Constant(0.5)"),
    "keras.initializers.HeNormal(seed=-3)",
    "keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3))",
    "{'class_name': 'Zeros', 'config': {}}",
    "keras_moe.initializers.PerExpert('zeros')",
]
_REGULARIZER = [
    *("None", "'l2'", "keras.regularizers.L1(0.1)", "keras.regularizers.l1_l2(0.1)"),
    "{'class_name': 'L2', 'config': {'l2': 0.01}}",
]
_ACTIVATION = ["'relu'", "None", "'gelu'", "keras.activations.silu", "ops.tanh"]
_TASKS = ["['a', 'b']", "2", "('a', 'b', 'c')", "['a']", "1", "(t for t in 'ab')"]
_SEED = ["None", "0", "7", "2**32 - 1", "np.int64(3)"]
_TEXT = ["'a'", "'name of mine'", "'größe'"]

# By the name of the argument; a constructor may have its own in its subject. The first
# of a required argument is the one in the cases that do not change it.
RIGHT: dict[str, list[str]] = {
    "action": ["'stop'", "'skip'"],
    "activation": _ACTIVATION,
    "activity_regularizer": _REGULARIZER,
    "alpha": ["1.5", "0", "0.5"],
    "amsgrad": _FLAG,
    "autocast": _FLAG,
    "auxiliary_units": [*_UNITS, "()", "None"],
    "beta_1": ["0.9", "0.0", "0.5"],
    "beta_2": ["0.999", "0.0", "0.5"],
    "bias_initializer": _INITIALIZER,
    "bias_regularizer": _REGULARIZER,
    "bias_update_rate": _RATE,
    "c": _RATE,
    "calibrator_weight": ["0.6", "0", "1.0"],
    "capacity_factor": ["None", *_POSITIVE],
    "clipnorm": ["None", *_POSITIVE],
    "clipvalue": ["None", *_POSITIVE],
    "conversion_weight": _POSITIVE,
    "decay": ["[0.5, 1.0]", "(1, 2)", "np.array([0.5, 0.25])"],
    "defined": ["None", "'b'", "['b', 'c']", "('b',)"],
    "dispatch": ["'auto'", "'split'", "'blocked'", "'capacity'", "'dense'"],
    "distribution": ["'normal'", "'dirichlet'"],
    "dropout": _RATE,
    "dtype": ["None", "'float32'", "'mixed_float16'", "'mixed_bfloat16'", "'float64'"],
    "ema_momentum": ["0.99", "0.0"],
    "ema_overwrite_frequency": ["None", *_INT],
    "embedding_units": _INT,
    "entropy_loss_weight": ["0.0", "0.1", "1"],
    "epsilon": ["1e-3", "1e-7", "1"],
    "expert_normalization": _FLAG,
    "expert_units": [*_UNITS, "None"],
    "experts": ["None", "MLPExperts(4, (8, 5))", "GLUExperts(4, 8, 5)"],
    "experts_per_group": ["2", "3", "1", "np.int64(2)"],
    "feature_gate_rank": ["8", "0", "2"],
    "final_activation": _ACTIVATION,
    "from_logits": _FLAG,
    "gamma": _POSITIVE,
    "gate_dropout": _RATE,
    "gate_kernel_initializer": _INITIALIZER,
    "gate_scale": _POSITIVE,
    "gate_temperature": _POSITIVE,
    "gate_units": ["()", *_UNITS],
    "gate_use_bias": _FLAG,
    "global_clipnorm": ["None", *_POSITIVE],
    "gradient_accumulation_steps": ["None", "2", "3"],
    "group": ["None", *_TEXT],
    "group_weight": ["'rows'", "'positives'", "'uniform'"],
    "groups": ["None", "[['a'], ['b']]", "(('b', 'a'),)", "[[0, 1]]"],
    "head": [
        *("'binary'", "'regression'", "heads.Ordinal(3)", "heads.MultiClass(3)"),
        *("'ziln'", "heads.Binary()", "'ranking'"),
    ],
    "hidden_activation": [*_ACTIVATION, "keras.layers.PReLU()"],
    "hidden_units": ["8", "3", "np.int64(4)"],
    "importance_loss_weight": ["None", "0.0", "0.1"],
    "initial_accumulator_value": ["0.1", "0.0", "1"],
    "initializer": [text for text in _INITIALIZER if text != "None"],
    "iterations": _INT,
    "jitter": _RATE,
    "joint_weight": ["1.0", "0", "0.5"],
    "kernel_initializer": _INITIALIZER,
    "kernel_regularizer": _REGULARIZER,
    "label": ["None", "'a'", "['a', 'b']"],
    "layers": ["[keras.layers.Dense(5), keras.Sequential([keras.layers.Dense(5)])]"],
    "learning_rate": [
        "0.01",
        "0.5",
        "1",
        "keras.optimizers.schedules.CosineDecay(0.1, 9)",
    ],
    "load_balancing_loss_weight": ["0.0", "0.01"],
    "load_loss_weight": ["None", "0.0", "0.1"],
    "loss": ["'head'", "None", "'mse'", "keras.losses.MeanSquaredError()"],
    "loss_scale_factor": ["None", "2.0", "128"],
    "max_in_a_row": _INT,
    "max_rows": ["16", "5", "np.int64(8)"],
    "method": ["'ipw'", "'dr'"],
    "metric": ["keras.metrics.AUC()", "keras.metrics.BinaryAccuracy()"],
    "metrics": ["()", "['auc']", "[keras.metrics.AUC()]", "['accuracy', 'mse']"],
    "min_losses": ["0.0", "[0.0, 0.1]", "-1"],
    "min_propensity": ["0.05", "1.0", "1"],
    "module_weight": ["0.5", "0.1"],
    "momentum": ["0.99", "0.0", "0.5"],
    "name": ["None", *_TEXT],
    "noise_kernel_initializer": _INITIALIZER,
    "normalization": _FLAG,
    "normalize": _FLAG,
    "num_bins": ["10", "2", "100"],
    "num_classes": ["3", "2"],
    "num_experts": ["4", "3", "2", "1", "np.int64(4)"],
    "num_groups": ["2", "1", "4"],
    "num_levels": ["2", "1", "3"],
    "num_scenarios": ["2", "1", "3"],
    "num_shared_experts": ["1", "2", "0"],
    "num_task_experts": ["1", "2", "0"],
    "output_units": _INT,
    "own_weight": ["0.8", "0.5"],
    "parents": ["{'a': [], 'b': ['a']}", "{'a': []}"],
    "per_unit": _FLAG,
    "phi_initializer": _INITIALIZER,
    "prefix": _TEXT,
    "priority": ["'position'", "'probability'"],
    "reduction": ["'sum'", "'mean_with_sample_weight'", "'none'", "None"],
    "renormalize": ["None", *_FLAG],
    "residual": _FLAG,
    "routed_scaling_factor": _POSITIVE,
    "router": [f"{name!r}" for name in routers.KNOWN]
    + ["None", "routers.TopKRouter(4, 2)", "routers.DenseRouter(4)"],
    "router_z_loss_weight": ["0.0", "0.001", "1"],
    "routing_metrics": ["()", "['load_cv']", "('expert_load', 'router_entropy')"],
    "rule": ["'sum'", "'product'", "'worst_relative_change'"],
    "scale": _POSITIVE,
    "score_function": ["'softmax'", "'sigmoid'"],
    "seed": _SEED,
    "segments": ["2", "['a', 'b']", "('a',)", "np.int64(3)", "range(2)"],
    "self_gate": _FLAG,
    "self_weight": ["0.9", "0", "1"],
    "shared_layers": ["None", "['bottom']"],
    "shared_top_k": ["None", "1", "2", "0"],
    "show": ["['load_cv']", "('expert_load', 'dropped_fraction')"],
    "skip_missing": _FLAG,
    "slots_per_expert": _INT,
    "stages": ["('click', 'conversion')", "['a', 'b', 'c']", "['a', 'b']"],
    "state_of": ["None"],
    "static": _FLAG,
    "steps": ["2", "1", "np.int64(3)"],
    "stream": ["0", "3", "[1, 2]", "(1,)", "np.int64(2)"],
    "tables": ["'(^|/)embeddings$'", "'table'", "'.*'"],
    "table_learning_rate_multiplier": _POSITIVE,
    "tasks": _TASKS,
    "temperature": [*_POSITIVE, "1e-12"],
    "threshold": ["0.9", "0.0", "0.5"],
    "top_k": ["2", "1", "3", "np.int64(2)", "None"],
    "top_k_experts": ["1", "2", "np.int64(1)"],
    "top_k_groups": ["1", "2", "None"],
    "tower_units": ["()", *_UNITS],
    "trainable": ["True", "False"],
    "units": _UNITS,
    "update_every": _INT,
    "use_bias": _FLAG,
    "use_ema": _FLAG,
    "vocabulary_size": ["None", "100", "np.int64(7)"],
    "weight_decay": ["None", "0.0", "0.01"],
    "weights": ["[1.0, 2.0]", "(1, 0)", "np.array([0.5, 1.0])"],
}


def floats(*shape: int) -> np.ndarray:
    """Random numbers, always the same for a shape."""
    seed = np.random.SeedSequence([len(shape), *shape])
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def probabilities(*shape: int) -> np.ndarray:
    """Positive numbers whose sum over the last axis is 1."""
    shares = np.exp(floats(*shape))
    return shares / np.maximum(shares.sum(-1, keepdims=True), 1e-9)


def integers(below: int, *shape: int) -> np.ndarray:
    """Different along the last axis, as the choices of a token are."""
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) % below).astype("int32")


def bools(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape) % 3 < 2


def routing(n: int, e: int, k: int) -> Any:
    """A record of tokens that choose experts."""
    probs = probabilities(n, e)
    indices = integers(e, n, k)
    weights = np.take_along_axis(probs, indices, axis=-1)
    return keras_moe.routing.Routing(indices, weights, np.log(probs), probs)


def built(layer: Any, width: int = 6) -> Any:
    """A layer that has been called."""
    layer(np.zeros((2, width), "float32"))
    return layer


NAMES |= {
    "F": floats,
    "P": probabilities,
    "I": integers,
    "B": bools,
    "R": routing,
    "built": built,
}
# Tensors of any rank, type and size.
TENSORS = [
    *("F(3, 4)", "F(3, 5)", "F(2, 4)", "F(3)", "F(2, 3, 4)", "F(0, 4)", "F(1, 4)"),
    *("F(3, 4).astype('float64')", "F(3, 4).astype('float16')", "F(3, 4).tolist()"),
    *("F(3, 4) > 0", "I(4, 3, 4)", "I(4, 3, 4).astype('uint8')", "F(3, 0)", "F(0)"),
    *(
        "ops.convert_to_tensor(F(3, 4))",
        "keras.Variable(F(3, 4))",
        "F(3, 1)",
        "F(3, 6)",
    ),
    *("np.full((3, 4), 'a')", "np.full((3, 4), None)", "F(3, 4) * 1j", "B(3)", "B(2)"),
    *("B(3).astype('int32')", "B(3).tolist()", "np.zeros(3, bool)", "I(2, 3)", "F(4)"),
    *("{'a': F(3, 4)}", "[F(3, 4), F(3, 4)]", "(F(3, 4),)", "B(3, 1)", "I(2, 3, 1)"),
    *("F(0, 6)", "F(1, 6)", "F(2, 3, 6)", "F(3, 6).astype('float64')", "I(4, 3, 6)"),
]
