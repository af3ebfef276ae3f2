"""`fit` of several JAX processes under `keras.distribution`, and of one.

`python -m tests.support.several_processes 4` starts four processes on this machine,
then one alone, and prints what each found as JSON, one line a process. Rows come from
one `tf.data.Dataset`, which Keras shards. Every process saves the model; the one alone
also loads what the others saved. Then the same with experts and a table that are split
over the processes, which save one file, load it and train on.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.support import processes

ROWS, BATCH, EPOCHS = 96, 16, 2


def main() -> None:
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        for line in [*train(count, folder), *train(1, folder)]:
            print(line)


def train(count: int, folder: str) -> list[str]:
    """Return the last line of each process."""
    module, address = "tests.support.several_processes", processes.free_address()
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    arguments = [
        ["-m", module, "worker", str(i), str(count), address, folder]
        for i in range(count)
    ]
    return processes.run_together([(given, environment) for given in arguments])


def work(process: int, count: int, address: str, folder: str) -> None:
    import keras

    if count > 1:
        keras.distribution.initialize(address, count, process)
    import jax
    import numpy as np

    assert jax.process_count() == count
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = build(keras)
    found = {"devices": jax.device_count(), "history": fit(model)}
    found["weights"] = [np.asarray(value).tolist() for value in model.get_weights()]
    model.save(Path(folder) / f"{process}-of-{count}.keras")
    if count == 1:
        others = sorted(Path(folder).glob("*-of-*.keras"))
        loaded = [keras.models.load_model(path) for path in others]
        found["loaded"] = {
            path.name: [np.asarray(v).tolist() for v in model.get_weights()]
            for path, model in zip(others, loaded, strict=True)
        }
        # The file has the state of the optimizer too.
        found["continued"] = [fit(model) for model in (model, loaded[-1])]
    found["split"] = split(keras, count, Path(folder) / "split.keras")
    print(json.dumps(found))


def split(keras, count: int, path: Path) -> dict:
    """Train, save and load a model whose experts are split over the processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from keras_moe.distribution import expert_parallel, save

    x = np.arange(3 * BATCH).reshape(BATCH, 3) % 32
    if count == 1:
        loaded = keras.models.load_model(path)
        return {
            "predictions": np.asarray(loaded(x)).tolist(),
            "continued": loaded.fit(rows_of_tables(), verbose=0).history,
        }
    active = expert_parallel(with_table(keras), {"batch": count}, expert_axis="batch")
    keras.distribution.set_distribution(active)
    model = with_table(keras)
    model.fit(rows_of_tables(), verbose=0)
    trained, fixed = (
        [v.value for v in vs]
        for vs in (model.trainable_variables, model.non_trainable_variables)
    )
    outputs = jax.jit(model.stateless_call)(trained, fixed, x)[0]
    whole = multihost_utils.process_allgather(outputs, tiled=True)
    found = {"predictions": np.asarray(whole).tolist()}
    kernel = model.get_layer("moe").experts.kernels[0].value
    found["split"] = [kernel.is_fully_addressable, kernel.addressable_data(0).shape]
    save(model, path)
    save(model, path)  # In place of the first one.
    found["file"] = path.exists(), [p.name for p in path.parent.glob(".*")]
    try:
        save(model, "/proc/none/model.keras")
    except OSError:
        found["refused"] = True
    loaded = keras.models.load_model(path)
    kernel = loaded.get_layer("moe").experts.kernels[0].value
    found["loaded"] = [kernel.is_fully_addressable, kernel.addressable_data(0).shape]
    found["continued"] = [
        m.fit(rows_of_tables(), verbose=0).history for m in (model, loaded)
    ]
    return found


def with_table(keras):
    from keras_moe.layers import MoE

    keras.utils.set_random_seed(1)
    ids = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Flatten()(keras.layers.Embedding(32, 4, name="table")(ids))
    hidden = MoE(4, (8, 6), router="bias_balanced", name="moe")(hidden)
    model = keras.Model(ids, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def rows_of_tables():
    import numpy as np
    import tensorflow as tf

    ids = np.random.default_rng(0).integers(0, 32, (ROWS, 3))
    dataset = tf.data.Dataset.from_tensor_slices((ids, ids[:, :1] / 32))
    return dataset.batch(BATCH, drop_remainder=True)


def build(keras):
    from keras_moe.layers import MMoE, MoE, Tower
    from keras_moe.multitask import MultiTaskModel

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = MoE(4, (8, 6), router="bias_balanced", load_balancing_loss_weight=0.1)
    shared = MMoE(3, 5, ["click", "stars"])(hidden(inputs))
    outputs = {"click": Tower((), "sigmoid"), "stars": Tower(())}
    outputs = {task: tower(shared[task]) for task, tower in outputs.items()}
    model = MultiTaskModel(inputs, outputs)
    losses = {"click": "binary_crossentropy", "stars": "mse"}
    model.compile(keras.optimizers.Adam(0.01), losses, metrics={"stars": ["mae"]})
    return model


def fit(model) -> dict:
    import numpy as np
    import tensorflow as tf

    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
    y = {"click": (x[:, :1] > 0).astype("float32"), "stars": x[:, 1:2]}
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.batch(BATCH, drop_remainder=True)
    return model.fit(dataset, epochs=EPOCHS, verbose=0).history


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    else:
        main()
