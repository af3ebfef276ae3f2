"""Train a mixture for two tasks with several JAX workers of Ray Train.

`python -m recsys_examples.ray_workers` starts Ray and two workers on this machine. On a
cluster, the same command with `--address auto` (or `ray://host:10001`) uses its
machines; nothing else changes.

Ray starts the workers and connects JAX. `keras.distribution.DataParallel` then sees the
devices of all workers: each batch of the `tf.data` pipeline is split over them, and the
gradients are summed by JAX.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TASKS = ("click", "stars")


def train(settings: dict[str, Any]) -> None:
    """Run on every worker: import Keras here, after Ray has connected JAX."""
    import keras
    import ray.train

    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = build_model()
    history = model.fit(
        dataset(settings),
        epochs=settings["epochs"],
        steps_per_epoch=settings["rows"] // settings["batch"],
        verbose=0,
    ).history
    with tempfile.TemporaryDirectory() as folder:
        # All workers must save: Keras makes variables for it, on all devices.
        model.save(Path(folder) / "model.keras")
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        found = {name: values[-1] for name, values in history.items()}
        found["devices"] = len(keras.distribution.list_devices())
        ray.train.report(found, checkpoint=checkpoint)


def build_model() -> Any:
    """Return a compiled model of a sparse mixture below a mixture for two tasks."""
    import keras

    from keras_moe.layers import MMoE, MoE, Tower
    from keras_moe.multitask import MultiTaskModel

    keras.utils.set_random_seed(0)
    inputs = keras.Input((16,))
    hidden = MoE(num_experts=4, expert_units=(32, 16), top_k=2)(inputs)
    shared = MMoE(num_experts=4, expert_units=16, tasks=TASKS)(hidden)
    model = MultiTaskModel(
        inputs,
        {
            "click": Tower((8,), "sigmoid")(shared["click"]),
            "stars": Tower((8,))(shared["stars"]),
        },
    )
    model.compile("adam", {"click": "binary_crossentropy", "stars": "mse"})
    return model


def dataset(settings: dict[str, Any]) -> Any:
    """Return the batches of all workers together; Keras gives each worker its rows."""
    import numpy as np
    import tensorflow as tf

    x = np.random.default_rng(0).normal(size=(settings["rows"], 16)).astype("float32")
    y = {"click": (x[:, :1] > 0).astype("float32"), "stars": x[:, 1:2] + x[:, 2:3]}
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    return rows.batch(settings["batch"], drop_remainder=True).repeat()


def main(arguments: list[str]) -> int:
    """Run the command with these arguments; print the metrics and the saved model."""
    parser = argparse.ArgumentParser(prog="python -m recsys_examples.ray_workers")
    parser.add_argument("--address", help="of a Ray cluster; default: this machine")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--platform", default="cpu", help="of JAX: cpu, cuda or tpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256, help="rows of all workers")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--storage", help="a folder that all machines share")
    given = parser.parse_args(arguments)

    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": given.platform}
    paths = [str(Path(__file__).parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    ray.init(
        given.address,
        runtime_env={"env_vars": environment},
        include_dashboard=None if given.address else False,
        num_cpus=None if given.address else given.workers + 1,
    )
    trainer = JaxTrainer(
        train,
        train_loop_config={
            "rows": given.rows,
            "batch": given.batch,
            "epochs": given.epochs,
        },
        # Ray connects JAX only if one is set; JAX_PLATFORMS still says which it is.
        jax_config=JaxConfig(
            use_gpu=given.platform != "tpu", use_tpu=given.platform == "tpu"
        ),
        scaling_config=ScalingConfig(
            num_workers=given.workers,
            use_gpu=given.platform == "cuda",
            use_tpu=given.platform == "tpu",
        ),
        run_config=RunConfig(
            name="keras_moe",
            storage_path=given.storage or tempfile.mkdtemp(prefix="ray_workers_"),
        ),
    )
    result = trainer.fit()
    print(json.dumps({"metrics": result.metrics, "model": result.checkpoint.path}))
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
