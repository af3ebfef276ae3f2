"""Optimizers under `MirroredStrategy`, run by `tests/optimizers/test_replicas.py`.

Each of two replicas gets half of a batch. Some ids stand in both halves, some more than
once in one half, and some in one half alone.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_moe import optimizers

ROWS = 16
CASES = {
    "FusedAdam": lambda: optimizers.FusedAdam(0.01, weight_decay=0.1),
    "FusedAdam, clipped": lambda: optimizers.FusedAdam(0.01, clipnorm=100.0),
    "FusedAdagrad": lambda: optimizers.FusedAdagrad(0.1),
    "FusedAdam, averaged": lambda: optimizers.FusedAdam(0.01, use_ema=True),
    "LazyAdam": lambda: optimizers.LazyAdam(0.01),
    "RowwiseAdagrad": lambda: optimizers.RowwiseAdagrad(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(optimizers.LazyAdam(0.01)),
}
if hasattr(keras.optimizers, "MultiOptimizer"):  # Since Keras 3.15.
    CASES["MultiOptimizer"] = lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            optimizers.FusedAdam(0.01), {".*/embeddings": optimizers.LazyAdam(0.01)}
        )
    )
REFUSED = {
    f"{kind.__name__}, {name}": lambda kind=kind, given=given: kind(0.01, **given)
    for kind in (optimizers.FusedAdam, optimizers.FusedAdagrad)
    for name, given in {
        "ema_overwrite_frequency": {"use_ema": True, "ema_overwrite_frequency": 2},
        "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    }.items()
}


def run(make, strategy: tf.distribute.Strategy) -> list:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 8, (ROWS, 3))
    x[ROWS // 2 :] += 4
    y = rng.normal(size=(ROWS, 1)).astype("float32")
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                keras.layers.Embedding(14, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(make(), "mse", jit_compile=False)
    model.fit(x, y, batch_size=ROWS, epochs=4, shuffle=False, verbose=0)
    values = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    return [np.asarray(value).tolist() for value in values]


def main() -> None:
    processor = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        processor, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    both = (tf.distribute.get_strategy(), mirrored)
    found = {
        name: [run(make, strategy) for strategy in both] for name, make in CASES.items()
    }
    for name, make in REFUSED.items():
        try:
            run(make, mirrored)
        except ValueError as error:
            found[name] = str(error)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
