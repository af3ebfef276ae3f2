"""Training on data as it should not be, and what the guard costs.

`python -m tests.robustness.bad_data --json FILE` trains small models on features that
are infinite or NaN, in each place and with each router; on empty batches, batches of
one row, labels of one class, histories that are all padding; with a router that sends
every row to one expert, and with learning rates of a million. `--cost` measures a step
with and without `FiniteGuard`, alternating in one process. `--only TEXT` runs the lines
of FILE that have the text again, and keeps the others.
"""

import argparse
import itertools
import statistics
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import ops
from rich.progress import track

from keras_moe.callbacks import FiniteGuard
from keras_moe.layers import MMoE, MoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.robustness.results import Tried, read, write

ROUTERS = ("top_k", "noisy_top_k", "bias_balanced", "expert_choice", "sinkhorn")
VALUES = (float("inf"), -float("inf"), float("nan"))
ROWS = 64


def sparse_model(router="top_k", jit_compile=False, optimizer="adam"):
    keras.utils.set_random_seed(0)
    inputs = {name: keras.Input((3,), name=name) for name in ("price", "age")}
    hidden = keras.layers.Concatenate()(list(inputs.values()))
    hidden = keras.layers.ReLU()(MoE(4, (8, 6), router=router)(hidden))
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
    model.compile(optimizer, "binary_crossentropy", jit_compile=jit_compile)
    return model


def task_model(optimizer="adam"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    shared = MMoE(4, (8, 6), ["click", "like"])(inputs)
    outputs = {t: Tower((4,), "sigmoid")(shared[t]) for t in ("click", "like")}
    model = MultiTaskModel(inputs, outputs)
    losses = dict.fromkeys(outputs, "binary_crossentropy")
    model.compile(optimizer, losses, metrics={task: ["accuracy"] for task in outputs})
    return model


def rows(count=ROWS):
    rng = np.random.default_rng(0)
    x = {n: rng.normal(size=(count, 3)).astype("float32") for n in ("price", "age")}
    return x, (x["price"][:, :1] > 0).astype("float32")


def is_finite(model):
    values = [*model.weights, *model.optimizer.variables]
    return all(bool(ops.all(ops.isfinite(value))) for value in values)


def names_the_feature(value, router, jit_compile, place):
    x, y = rows()
    x["age"][place, 1] = value
    model = sparse_model(router, jit_compile)
    try:
        model.fit(x, y, 16, shuffle=False, callbacks=[FiniteGuard()], verbose=0)
    except FloatingPointError as error:
        expected = (
            f"batch {place // 16 + 1}: feature 'age' is not finite in row {place % 16}"
        )
        return expected in str(error) and is_finite(model)
    return False


def skips_the_batch(value, router, jit_compile, place):
    x, y = rows()
    x["price"][place, 0] = value
    model = sparse_model(router, jit_compile)
    guard = FiniteGuard("skip")
    history = model.fit(x, y, 16, epochs=2, callbacks=[guard], verbose=0).history
    return history["skipped_batches"] == [1, 1] and is_finite(model)


def survives_a_learning_rate(optimizer, model):
    optimizer = optimizer(1e6)
    x, y = rows()
    try:
        if model is task_model:
            found = task_model(optimizer)
            inputs, labels = (
                np.concatenate(list(x.values()), -1),
                {"click": y, "like": y},
            )
        else:
            found, inputs, labels = sparse_model(optimizer=optimizer), x, y
        found.fit(inputs, labels, 16, epochs=5, callbacks=[FiniteGuard()], verbose=0)
    except FloatingPointError:
        pass
    return is_finite(found)


def trains_on(count, labels, model):
    x, y = rows(count)
    y = y if labels is None else np.full_like(y, labels)
    if model is task_model:
        found, inputs = task_model(), np.concatenate(list(x.values()), -1)
        y = {"click": y, "like": y}
    else:
        found, inputs = sparse_model(), x
    found.fit(inputs, y, 16, epochs=2, callbacks=[FiniteGuard()], verbose=0)
    return is_finite(found)


def takes_no_rows(make):
    x, _ = rows(0)
    model = make()
    inputs = np.concatenate(list(x.values()), -1) if make is task_model else x
    outputs = model(inputs, training=True)
    losses = [*keras.tree.flatten(outputs), *model.losses]
    return all(bool(ops.all(ops.isfinite(loss))) for loss in losses)


def passes_over_padding(router):
    keras.utils.set_random_seed(0)
    layer = MoE(4, (8, 6), router=router)
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")
    mask = np.arange(5) < np.array([[0], [1], [5], [0]])
    outputs = ops.convert_to_numpy(layer(x, mask=ops.convert_to_tensor(mask)))
    return bool(np.isfinite(outputs).all() and not outputs[~mask].any())


def trains_when_collapsed(router):
    model = sparse_model(router)
    (layer,) = [found for found in model.layers if isinstance(found, MoE)]
    kernel = np.zeros(layer.router.kernel.shape, "float32")
    kernel[:, 0] = 1e4
    layer.router.kernel.assign(kernel)
    x, y = rows()
    x = {name: np.abs(value) for name, value in x.items()}
    # Without the noise of routers, which is larger than what an epoch changes.
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, 16, epochs=5, callbacks=[FiniteGuard()], verbose=0)
    return is_finite(model) and model.evaluate(x, y, verbose=0) < before


def cases():
    """Return (what, right outcome, function, arguments) of every case."""
    bad = list(itertools.product(VALUES, ROUTERS, [False], [0, 21]))
    bad += [(value, "top_k", True, 21) for value in VALUES]
    sgd, adam = keras.optimizers.SGD, keras.optimizers.Adam
    both = (sparse_model, task_model)
    return [
        (
            "infinite or NaN features, `FiniteGuard()`",
            "stops, names batch, feature and row, all weights finite",
            names_the_feature,
            bad,
        ),
        (
            'infinite or NaN features, `FiniteGuard("skip")`',
            "skips and counts the batch, all weights finite",
            skips_the_batch,
            bad,
        ),
        (
            "a learning rate of a million",
            "stops, or all weights finite",
            survives_a_learning_rate,
            list(itertools.product((sgd, adam), both)),
        ),
        (
            "batches of one row, labels of one class",
            "all weights finite",
            trains_on,
            [
                (count, label, model)
                for count in (1, 17, ROWS)
                for label in (None, 0.0, 1.0)
                for model in both
            ],
        ),
        (
            "empty batches",
            "no error, losses finite",
            takes_no_rows,
            [(m,) for m in both],
        ),
        (
            "histories that are partly or wholly padding",
            "zeros for padding, all outputs finite",
            passes_over_padding,
            [(router,) for router in ("top_k", "noisy_top_k", "bias_balanced")],
        ),
        (
            "a router that sends every row to one expert",
            "finite, and the loss falls",
            trains_when_collapsed,
            [(router,) for router in ("top_k", "noisy_top_k", "bias_balanced")],
        ),
    ]


def cost(repeats=15, steps=40):
    """Return the ratios of a step with the guard to one without, by model."""
    rng = np.random.default_rng(0)
    found = {}
    for name, width, make in (
        ("MMoE, 8 experts", 256, lambda x: MMoE(8, (256, 128), ["a", "b"])(x)["a"]),
        ("MoE, 32 experts", 256, lambda x: MoE(32, (512, 256))(x)),
    ):
        x = rng.normal(size=(1024 * steps, width)).astype("float32")
        times = {True: [], False: []}
        models = {}
        for guarded in (True, False):
            keras.utils.set_random_seed(0)
            inputs = keras.Input((width,))
            models[guarded] = keras.Model(inputs, keras.layers.Dense(1)(make(inputs)))
            models[guarded].compile("adam", "mse")
        for _ in range(repeats + 1):
            for guarded, model in models.items():
                callbacks = [_Timed()]
                if guarded:
                    callbacks.append(FiniteGuard())
                model.fit(x, x[:, :1], 1024, callbacks=callbacks, verbose=0)
                times[guarded] += [callbacks[0].seconds]
        # The first step of a `fit` traces.
        ratios = [g / p for g, p in zip(times[True][1:], times[False][1:], strict=True)]
        found[name] = statistics.median(ratios), *statistics.quantiles(ratios, n=4)[::2]
    return found


class _Timed(keras.callbacks.Callback):
    """The median of the seconds from one batch to the next."""

    def on_train_begin(self, logs=None):
        self._ends = []

    def on_train_batch_end(self, batch, logs=None):
        self._ends.append(time.perf_counter())

    def on_train_end(self, logs=None):
        self.seconds = statistics.median(np.diff(self._ends[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Tried] = {}
    command = "python -m tests.robustness.bad_data"
    if given.only and given.json.exists():
        _, command, known = read(given.json)
        found = {line.what: line for line in known}
    for what, outcome, function, arguments in cases():
        if given.only not in what:
            continue
        failed = [case for case in track(arguments, what) if not function(*case)]
        note = f"not right: {failed}" if failed else ""
        right = len(arguments) - len(failed)
        found[what] = Tried(what, len(arguments), right, outcome, note)
    if given.cost:
        command = "python -m tests.robustness.bad_data --cost"
        for name, (median, low, high) in cost().items():
            what = f"a step of {name} with `FiniteGuard`"
            found[what] = Tried(
                what,
                1,
                int(median <= 1.02),
                "at most 1.02 times the time",
                f"{median:.3f} times, quartiles {low:.3f} and {high:.3f}",
            )
    tried = list(found.values())
    write(given.json, "bad data", command, tried)
    for line in tried:
        print(f"{line.survived} of {line.cases}: {line.what}. {line.note}")


if __name__ == "__main__":
    main()
