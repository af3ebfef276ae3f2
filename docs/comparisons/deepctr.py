"""Compare MMoE, PLE and the shared bottom with DeepCTR on equal weights.

    pip install deepctr && python -m docs.comparisons.deepctr

DeepCTR's models run here under Keras 3, as `tf.keras` is. Their weights are copied into
our layers, both predict the same rows, and the largest difference is printed.
"""

from __future__ import annotations

import importlib.metadata
import re

import deepctr
import keras
import numpy as np
import tensorflow as tf
from deepctr.feature_column import DenseFeat
from deepctr.models import MMOE, PLE, SharedBottom

import keras_moe
from keras_moe.layers import Tower
from keras_moe.multitask import MultiTaskModel

TASKS = ["click", "buy"]
FEATURES, ROWS = 16, 1000
SIZES = {"tower_dnn_hidden_units": (8,), "task_names": TASKS}


def main() -> None:
    """Print the largest difference of each pair of models."""
    keras.utils.set_random_seed(0)
    pairs = _pairs()
    versions = {name: importlib.metadata.version(name) for name in ("deepctr", "keras")}
    print(versions, "TensorFlow", tf.__version__, "on Keras 3:", _runs_on_keras_3())
    x = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype("float32")
    first = [pairs["MMoE"][0].get_layer(f"expert_{i}").get_weights() for i in range(4)]
    spread = max(np.abs(other[0] - first[0][0]).max() for other in first)
    print(f"first kernels of DeepCTR's experts before training: difference {spread}")
    for name, (theirs, body) in pairs.items():
        _draw_biases(theirs)
        ours = _with_towers(body)
        _copy(theirs, ours, body)
        expected = theirs.predict({"features": x}, verbose=0)
        found = ours.predict(x, verbose=0)
        for task, values in zip(TASKS, expected, strict=True):
            difference = np.abs(found[task] - values).max()
            print(f"{name}, {task}: largest difference {difference:.1e}")
            assert difference < 1e-6


def _pairs():
    """Return a model of DeepCTR and a layer of ours by their name."""
    columns = [DenseFeat("features", FEATURES)]
    experts = {"num_experts": 4, "expert_dnn_hidden_units": (32, 16), **SIZES}
    levels = {"num_levels": 2, "shared_expert_num": 1, "specific_expert_num": 2}
    bottom = {"bottom_dnn_hidden_units": (32, 16)}
    ours = {"num_experts": 4, "expert_units": (32, 16), "tasks": TASKS}
    return {
        "MMoE": (MMOE(columns, **experts), keras_moe.layers.MMoE(**ours)),
        "MMoE, gates with a hidden layer": (
            MMOE(columns, gate_dnn_hidden_units=(6,), **experts),
            keras_moe.layers.MMoE(**ours, gate_units=(6,), gate_use_bias=True),
        ),
        "PLE": (
            PLE(columns, expert_dnn_hidden_units=(32, 16), **levels, **SIZES),
            keras_moe.layers.PLE(
                num_levels=2,
                num_shared_experts=1,
                num_task_experts=2,
                expert_units=(32, 16),
                tasks=TASKS,
            ),
        ),
        "shared bottom": (
            SharedBottom(columns, **bottom, **SIZES),
            keras_moe.layers.SharedBottom((32, 16), tasks=TASKS),
        ),
    }


def _runs_on_keras_3() -> bool:
    return issubclass(deepctr.layers.DNN, keras.layers.Layer)


def _with_towers(body):
    inputs = keras.Input((FEATURES,), name="features")
    shared = body(inputs)
    towers = {t: Tower((8,), activation="sigmoid", name=t)(shared[t]) for t in TASKS}
    return MultiTaskModel(inputs, towers)


def _draw_biases(model) -> None:
    """Give biases values other than 0, so that a misplaced one would show."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if "bias" in weight.path:
            weight.assign(rng.normal(scale=0.1, size=weight.shape))


def _copy(theirs, ours, body) -> None:
    """Copy the weights of DeepCTR's model, whose layers have names by their role."""
    values = {w.path: np.asarray(w.value) for w in theirs.weights}

    def weights(layers, kind, depth):
        """Return the weights of one depth, stacked over layers of these names."""
        return np.stack([values[f"{layer}/{kind}{depth}"] for layer in layers])

    if isinstance(body, keras_moe.layers.SharedBottom):
        bottoms = [w for w in theirs.weights if w.path.startswith("dnn")]
        given = [np.asarray(w.value)[None] for w in _by_depth(bottoms)]
        body.set_weights(given)  # One expert.
    elif isinstance(body, keras_moe.layers.MMoE):
        names = [f"expert_{i}" for i in range(body.num_experts)]
        gates = [body.gates]
        _copy_experts(body.experts, names, weights)
        _copy_gates(gates[0], [f"gate_{t}" for t in TASKS], weights, values, "")
    else:
        for level, experts in enumerate(body.experts):
            head = f"level_{level}_"
            own = range(body.num_task_experts)
            names = [f"{head}task_{t}_expert_specific_{i}" for t in TASKS for i in own]
            shared = range(body.num_shared_experts)
            names += [f"{head}expert_shared_{i}" for i in shared]
            _copy_experts(experts, names, weights)
            gates = [f"{head}gate_specific_{t}" for t in TASKS]
            _copy_gates(body.gates[level], gates, weights, values, head)
            if level < body.num_levels - 1:
                gates = [f"{head}gate_shared"]
                _copy_gates(body.shared_gates[level], gates, weights, values, head)
    for place, task in enumerate(TASKS):
        paths = [p for p in values if re.fullmatch(r"dense(_\d+)?/kernel", p)]
        tower = [values[f"tower_{task}/{kind}0"] for kind in ("kernel", "bias")]
        unit = paths[place - len(TASKS)]  # The last layers of the model.
        last = [values[unit], values[f"{task}/global_bias"]]
        ours.get_layer(task).set_weights([*tower, *last])


def _by_depth(weights):
    """Kernel and bias of the first layer, then of the second."""
    return sorted(weights, key=lambda w: (w.path[-1], "bias" in w.path))


def _copy_experts(experts, names, weights) -> None:
    for depth, (kernel, bias) in enumerate(
        zip(experts.kernels, experts.biases, strict=True)
    ):
        kernel.assign(weights(names, "kernel", depth))
        bias.assign(weights(names, "bias", depth))


def _copy_gates(gates, names, weights, values, head) -> None:
    """A gate is a DNN with biases, then a softmax layer without one."""
    softmax = [name.replace("gate_", "gate_softmax_", 1) for name in names]
    last = np.stack([values[f"{name}/kernel"] for name in softmax])
    for weight in gates.weights:
        kind, depth = weight.path.rsplit("/", 1)[1].split("_")
        if weight.shape == last.shape and kind == "kernel":
            weight.assign(last)
        elif kind == "bias" and weight.shape[-1] == last.shape[-1]:
            weight.assign(np.zeros(weight.shape))
        else:
            weight.assign(weights(names, kind, int(depth)))


if __name__ == "__main__":
    main()
