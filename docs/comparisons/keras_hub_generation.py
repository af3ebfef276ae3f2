"""Time a KerasHub language model before and after its blocks are replaced.

    pip install keras-hub && python -m docs.comparisons.keras_hub_generation

Both models have the same random weights. Their generations alternate in one process
after a warm-up; the figure is the ratio of the medians. The tokens must be equal.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from keras_moe.convert import replace_keras_hub_blocks

LAYERS, WIDTH, HIDDEN, PROMPT, LENGTH, REPEATS = 4, 128, 448, 64, 128, 5


def main() -> None:
    """Print a ratio for each number of experts and sequences."""
    versions = {p: importlib.metadata.version(p) for p in ("keras-hub", "keras")}
    print(versions, "TensorFlow", tf.__version__)
    print(f"{LAYERS} layers, width {WIDTH}, hidden {HIDDEN}, 2 experts per token")
    for experts, sequences in ((8, 1), (8, 16), (32, 1)):
        _compare(experts, sequences)


def _model(experts: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=1000,
        num_layers=LAYERS,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=HIDDEN,
        num_experts=experts,
        top_k=2,
        sliding_window=LENGTH,
    )
    model = keras_hub.models.MixtralCausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def _compare(experts: int, sequences: int) -> None:
    before, after = _model(experts), _model(experts)
    replace_keras_hub_blocks(after)
    rng = np.random.default_rng(0)
    mask = np.zeros((sequences, LENGTH), "int32")
    mask[:, :PROMPT] = 1
    ids = rng.integers(1, 1000, mask.shape).astype("int32") * mask
    inputs = {"token_ids": ids, "padding_mask": mask}
    models = {"before": before, "after": after}
    times: dict[str, list[float]] = {name: [] for name in models}
    tokens = {}
    for attempt in range(REPEATS + 1):
        for name, model in models.items():
            start = time.perf_counter()
            tokens[name] = model.generate(dict(inputs), stop_token_ids=None)
            if attempt > 0:  # The first traces the graph.
                times[name].append(time.perf_counter() - start)
    equal = np.mean(tokens["before"]["token_ids"] == tokens["after"]["token_ids"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{experts} experts, {sequences} sequences, {LENGTH - PROMPT} new tokens each: "
        f"{equal:.0%} of tokens equal; after {medians['after']:.2f} s, before "
        f"{medians['before']:.2f} s, ratio {medians['after'] / medians['before']:.2f}"
    )


if __name__ == "__main__":
    main()
