"""A Keras 2 model with `LegacyLayer` on several workers of TensorFlow, and on one.

`python -m tests.support.legacy_workers 2` starts two workers on this machine under
`MultiWorkerMirroredStrategy`, then one without a strategy, and prints the losses and
weights of each as JSON, one line a worker.
"""

import json
import os
import sys

from tests.support import processes

ROWS, BATCH, EPOCHS = 64, 16, 3


def main() -> None:
    for line in [*train(int(sys.argv[1])), *train(1)]:
        print(line)


def train(workers: int) -> list[str]:
    """Return the last line of each worker."""
    cluster = {"worker": [processes.free_address() for _ in range(workers)]}
    arguments = ["-m", "tests.support.legacy_workers", "worker"]
    tasks = [{"type": "worker", "index": i} for i in range(workers)]
    return processes.run_together(
        (arguments, {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})})
        for task in tasks
    )


def work() -> None:
    import keras_moe.tfrs
    from keras_moe.tfrs import LegacyLayer, tf_keras

    # isort: split
    import keras
    import numpy as np
    import tensorflow as tf

    from keras_moe.layers import MMoE, MoE

    workers = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
    strategy = tf.distribute.get_strategy()
    if len(workers) > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    found = {"replicas": strategy.num_replicas_in_sync}
    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
    x[::2] += 1.0  # The rows of the workers like different experts.
    keras.utils.set_random_seed(0)
    tf_keras.utils.set_random_seed(0)
    with strategy.scope():
        moe = MoE(
            4,
            (8, 5),
            router=keras_moe.routers.BiasBalancedRouter(4, 2, bias_update_rate=0.1),
            load_balancing_loss_weight=0.0,
            kernel_regularizer="l2",
        )
        inputs = tf_keras.Input((6,))
        tasks = LegacyLayer(MMoE(3, 5, ["click", "buy"]))(LegacyLayer(moe)(inputs))
        joined = tf_keras.layers.Concatenate()([tasks["click"], tasks["buy"]])
        model = tf_keras.Model(inputs, tf_keras.layers.Dense(1)(joined))
        model(x[:4])  # The weights must exist before a replica calls the layer.
        model.compile("sgd", "mse", metrics=["mae"])
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(BATCH)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    fitted = model.fit(dataset.with_options(options), epochs=EPOCHS, verbose=0)
    found["history"] = fitted.history
    found["bias"] = np.asarray(moe.router.expert_bias).tolist()
    found["weights"] = [w.numpy().tolist() for w in model.trainable_weights]
    if len(workers) > 1:
        found["refused"] = refused(strategy)
    print(json.dumps(found))


def refused(strategy) -> str:
    """Return the error of a model of Keras 3 under this strategy."""
    import keras

    from keras_moe.multitask import MultiTaskModel

    with strategy.scope():
        inputs = keras.Input((6,))
        model = MultiTaskModel(inputs, {"click": keras.layers.Dense(1)(inputs)})
        try:
            model.compile("sgd", {"click": "mse"})
        except ValueError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work()
    else:
        main()
