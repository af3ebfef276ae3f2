"""Compare MoE with KerasHub's Mixtral and Qwen blocks on equal weights.

    pip install keras-hub && python -m docs.comparisons.keras_hub

Prints the largest difference of the outputs, of the load balancing loss, and of the
gradients by the inputs. Then it looks at what is computed: the weights of one expert
are set to NaN, which reaches only the tokens that the expert computes.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time

import keras
import numpy as np
import tensorflow as tf
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock
from keras_hub.src.models.qwen_moe.qwen_moe_decoder import QwenSparseMoeBlock

from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 64, 8, 2


def main() -> None:
    """Print the comparisons."""
    versions = {p: importlib.metadata.version(p) for p in ("keras-hub", "keras")}
    print(versions, "TensorFlow", tf.__version__)
    tokens = np.random.default_rng(0).normal(size=(4, 50, HIDDEN)).astype("float32")
    _compare("Mixtral", *_mixtral(HIDDEN, INTERMEDIATE, EXPERTS), tokens)
    _compare("Qwen", *_qwen(), tokens)
    _count_computed_tokens(tokens)
    for experts in (8, 32):
        _time(experts)


def _mixtral(hidden, intermediate, experts):
    """Return KerasHub's block and a `MoE` with its weights."""
    keras.utils.set_random_seed(0)
    theirs = MixtralSparseMoeBlock(
        hidden_dim=hidden,
        intermediate_dim=intermediate,
        num_experts=experts,
        top_k=TOP_K,
        router_aux_loss_coef=0.01,
    )
    theirs.build((None, None, hidden))
    ours = MoE(
        num_experts=experts,
        top_k=TOP_K,
        experts=GLUExperts(
            num_experts=experts, hidden_units=intermediate, activation="silu"
        ),
        load_balancing_loss_weight=0.01,
    )
    ours.build((None, None, hidden))
    bank = theirs.expert_bank
    ours.router.kernel.assign(theirs._sparse_feedforward_gate_dense.kernel)
    ours.experts.gate_kernel.assign(bank._expert_feedforward_gate_dense)
    ours.experts.up_kernel.assign(bank._expert_feedforward_intermediate_dense)
    ours.experts.down_kernel.assign(bank._expert_feedforward_output_dense)
    return theirs, ours


def _qwen():
    """The same for Qwen's block; its shared expert stays outside of the `MoE`."""
    keras.utils.set_random_seed(0)
    theirs = QwenSparseMoeBlock(
        hidden_dim=HIDDEN,
        moe_intermediate_dim=INTERMEDIATE,
        shared_expert_intermediate_dim=INTERMEDIATE,
        num_experts=EXPERTS,
        top_k=TOP_K,
        norm_top_k_prob=True,
        router_aux_loss_coefficient=0.01,
    )
    theirs.build((None, None, HIDDEN))
    moe = MoE(
        num_experts=EXPERTS,
        top_k=TOP_K,
        experts=GLUExperts(
            num_experts=EXPERTS, hidden_units=INTERMEDIATE, activation="silu"
        ),
        load_balancing_loss_weight=0.01,
    )
    moe.build((None, None, HIDDEN))
    bank = theirs.expert_bank
    gate, up = np.split(np.asarray(bank._expert_feedforward_gate_dense), 2, axis=-1)
    moe.router.kernel.assign(theirs._sparse_feedforward_gate_dense.kernel)
    moe.experts.gate_kernel.assign(gate)
    moe.experts.up_kernel.assign(up)
    moe.experts.down_kernel.assign(bank._expert_feedforward_output_dense)

    def ours(tokens, training=None):
        shared = theirs.shared_expert_dense(tokens)
        weight = keras.ops.sigmoid(theirs.shared_expert_gate_dense(tokens))
        return moe(tokens, training=training) + weight * shared

    ours.losses = lambda: moe.losses
    return theirs, ours


def _compare(name, theirs, ours, tokens) -> None:
    results = []
    for layer in (theirs, ours):
        inputs = tf.Variable(tokens)
        with tf.GradientTape() as tape:
            outputs = layer(inputs, training=True)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            total = tf.reduce_sum(outputs * tf.cos(outputs))
        losses = layer.losses() if callable(layer.losses) else layer.losses
        results.append((outputs, sum(losses), tape.gradient(total, inputs)))
    for what, *pair in zip(("outputs", "loss", "gradients"), *results, strict=True):
        difference = np.abs(np.subtract(*[np.asarray(value) for value in pair])).max()
        largest = np.abs(np.asarray(pair[0])).max()
        print(f"{name}, {what}: difference {difference:.1e}, largest {largest:.3f}")
        assert difference < 1e-6 * max(1, largest)


def _count_computed_tokens(tokens) -> None:
    theirs, ours = _mixtral(HIDDEN, INTERMEDIATE, EXPERTS)
    flat = tokens.reshape(-1, HIDDEN)
    chosen = np.asarray(ours.router(flat).expert_indices)
    kernels = (theirs.expert_bank._expert_feedforward_output_dense,)
    for kernel in (*kernels, ours.experts.down_kernel):
        values = keras.ops.convert_to_numpy(kernel).copy()
        values[0] = np.nan
        kernel.assign(values)
    print(f"{(chosen == 0).any(axis=1).sum()} of {len(flat)} tokens chose expert 0;")
    for name, outputs in {"KerasHub": theirs(tokens)[0], "MoE": ours(tokens)}.items():
        rows = np.isnan(np.asarray(outputs)).any(axis=-1).sum()
        print(f"  with its weights NaN, {rows} outputs of {name} are NaN")


def _time(experts) -> None:
    theirs, ours = _mixtral(256, 512, experts)
    tokens = np.random.default_rng(0).normal(size=(8, 256, 256)).astype("float32")
    tokens = tf.constant(tokens)
    calls = {"KerasHub": tf.function(theirs), "MoE": tf.function(ours)}
    times: dict = {name: [] for name in calls}
    for attempt in range(23):
        for name, call in calls.items():
            start = time.perf_counter()
            keras.tree.map_structure(lambda x: x.numpy(), call(tokens))
            if attempt > 1:
                times[name].append(time.perf_counter() - start)
    share = statistics.median(times["MoE"]) / statistics.median(times["KerasHub"])
    print(f"{experts} experts, 2,048 tokens: MoE takes {share:.2f} of KerasHub's time")


if __name__ == "__main__":
    main()
