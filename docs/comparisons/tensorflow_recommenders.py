"""Compare a `tfrs.Model` of Keras 2 layers with one that has our layers inside.

    pip install ".[tfrs]" && python -m docs.comparisons.tensorflow_recommenders

The shared bottom is written once in Keras 2 and once as a `SharedBottom` in a
`LegacyLayer`. Both start from the same weights and train on the same rows.
"""

from __future__ import annotations

import keras_moe.tfrs  # noqa: F401  # isort: skip  # before any use of tf.keras

import importlib.metadata

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from keras_moe.layers import SharedBottom
from keras_moe.tfrs import LegacyLayer

TASKS = ["click", "stars"]


class Ranker(tfrs.Model):
    """Two tasks on a body."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.towers = {task: tf.keras.layers.Dense(1) for task in TASKS}
        self.click = tfrs.tasks.Ranking(
            tf.keras.losses.BinaryCrossentropy(from_logits=True)
        )
        self.stars = tfrs.tasks.Ranking(tf.keras.losses.MeanSquaredError())

    def call(self, features):
        """Return a logit and a number of stars for each row."""
        shared = self.body(features)
        if not isinstance(shared, dict):
            shared = dict.fromkeys(TASKS, shared)
        return {task: self.towers[task](shared[task]) for task in TASKS}

    def compute_loss(self, inputs, training=False):
        """Return the sum of the losses."""
        features, labels = inputs
        found = self(features)
        return self.click(labels["click"], found["click"]) + self.stars(
            labels["stars"], found["stars"]
        )


def main() -> None:
    """Print the largest difference before and after training."""
    names = ("tensorflow-recommenders", "tf_keras", "keras")
    print({name: importlib.metadata.version(name) for name in names})
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1024, 8)).astype("float32")
    labels = {"click": (x[:, :1] > 0).astype("float32"), "stars": x[:, 1:2]}
    dense = tf.keras.Sequential(
        [tf.keras.layers.Dense(units, activation="relu") for units in (32, 16)]
    )
    models = [Ranker(dense), Ranker(LegacyLayer(SharedBottom((32, 16), tasks=TASKS)))]
    for model in models:
        model(x)
        model.compile(tf.keras.optimizers.Adam(1e-2))
    _copy(*models)
    _compare("before training", models, x)
    for model in models:
        model.fit(x, labels, batch_size=128, epochs=5, shuffle=False, verbose=0)
    _compare("after 40 steps", models, x)


def _copy(source, target) -> None:
    """Copy weights by their shape; ours have an axis of one expert before it."""
    values: dict = {}
    for weight in source.trainable_weights:
        values.setdefault(tuple(weight.shape), []).append(weight.numpy())
    for weight in target.trainable_weights:
        shape = tuple(weight.shape)
        shape = shape if shape in values else shape[1:]
        weight.assign(tf.reshape(values[shape].pop(0), weight.shape))


def _compare(when, models, x) -> None:
    expected, found = [model(x) for model in models]
    difference = max(
        float(tf.reduce_max(tf.abs(found[task] - expected[task]))) for task in TASKS
    )
    print(f"{when}: largest difference {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
