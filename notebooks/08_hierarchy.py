# %% [markdown]
"""
# Two levels of gates or one?

With many experts a router has many outputs. `HierarchicalMoE` chooses in two steps, as
[Jordan and Jacobs (1994)](https://doi.org/10.1162/neco.1994.6.2.181) and
[Shazeer et al. (2017), appendix B](https://arxiv.org/abs/1701.06538): first groups,
then experts within them. Is it better or cheaper than `MoE`, whose single gate sees all
experts? This notebook compares them with 16, 64 and 256 experts, each row with four of
them, on a task that has groups and on one that has none.
"""

# %%
import os
import time
from itertools import product

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf

from keras_moe.layers import HierarchicalMoE, MoE

# Small settings for the tests; the outputs below are those of the full settings.
QUICK = os.environ.get("KERAS_MOE_NOTEBOOK_QUICK") == "1"
SEEDS, STEPS, REPEATS = (1, 2, 1) if QUICK else (5, 600, 30)
COUNTS = (16,) if QUICK else (16, 64, 256)
FEATURES, WIDTH, BATCH, KINDS = 16, 16, 256, 256
RATES = (3e-3,) if QUICK else (1e-3, 3e-3, 1e-2)
TASKS, LEVELS = ("groups", "no groups"), ("flat", "two levels")

# %% [markdown]
"""
## Two tasks of 256 kinds of rows

A row belongs to one of 256 kinds, and is the centre of its kind plus an offset. The
target is linear in the offset, with slopes and a level of the kind's own, so a model
needs to know which kind a row is of.

- *Groups*: the 256 kinds are 16 groups of 16. Centres, slopes and levels of a group are
  near each other: 80% of their variance is between groups.
- *No groups*: the same with independent kinds.

Rows are drawn anew for each step, so there is no overfitting. Validation and test are
drawn from the same kinds, each seed has its own kinds.
"""


# %%
class Task:
    def __init__(self, name, seed):
        rng = np.random.default_rng(seed)
        group, kind = rng.normal(size=(16, 1, 33)), rng.normal(size=(16, 16, 33))
        share = 0.8 if name == "groups" else 0.0
        kinds = np.sqrt(share) * group + np.sqrt(1 - share) * kind
        self.centres, self.slopes, self.levels = np.split(
            kinds.reshape(KINDS, 33), [FEATURES, 2 * FEATURES], axis=1
        )

    def draw(self, count, seed):
        rng = np.random.default_rng(seed)
        kind = rng.integers(0, KINDS, count)
        offset = 0.3 * rng.normal(size=(count, FEATURES))
        target = self.levels[kind, 0] + np.sum(offset * self.slopes[kind], axis=1)
        rows = self.centres[kind] + offset
        return rows.astype("float32"), target.astype("float32")[:, None]


# %% [markdown]
"""
## The model, and its cost by formula

One layer between the inputs and the output: four experts of width 16 for each row.
`HierarchicalMoE` chooses 2 of `sqrt(e)` groups and 2 experts in each; `MoE` the best 4
of all. Experts cost the same, so do all other parts but the router.

By formula, a flat router has `d e` multiply-adds per row. A hierarchical one needs
`d (g + 2 e / g)` with `g` groups, if it computes the gates of the chosen groups alone.
The library computes the gates of all groups, `d (g + e)`, in one matrix product: for
routers of this size that is faster than to gather the kernels of each row's groups.
"""


# %%
def layer(levels, e, units=(WIDTH, WIDTH), dispatch="auto"):
    settings = {"dispatch": dispatch, "name": "moe"}
    if levels == "flat":
        return MoE(e, units, top_k=4, **settings)
    groups = int(np.sqrt(e))
    return HierarchicalMoE(groups, e // groups, units, **settings)


def build(levels, e):
    inputs = keras.Input((FEATURES,))
    # Experts are so small here that to compute all of them is the fastest.
    moe = layer(levels, e, dispatch="dense")
    hidden = keras.layers.Activation("relu")(moe(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


costs = pd.DataFrame(
    {
        e: {
            "parameters, flat": build("flat", e).count_params(),
            "parameters, two levels": build("two levels", e).count_params(),
            "experts": 4 * (FEATURES * WIDTH + WIDTH**2),
            "flat router": FEATURES * e,
            "two levels, by formula": int(FEATURES * (e**0.5 + 2 * e**0.5)),
            "two levels, computed": int(FEATURES * (e**0.5 + e)),
        }
        for e in COUNTS
    }
).T
costs.index.name = "e"
print("parameters, and multiply-adds per row")
print(costs.to_string())

# %% [markdown]
"""
## Training

Same steps, same rows for both layers. The learning rate of each layer, `e` and task is
the best of three on validation, with seed 0. Both have the load balancing loss with its
default weight.
"""


# %%
class Runs:
    """The runs of one layer: traced once, new weights for each seed and task."""

    def __init__(self, levels, e):
        self.levels, self.e, self.start = levels, e, {}
        self.model = build(levels, e)
        self.model.compile(
            keras.optimizers.Adam(1e-3),
            "mse",
            steps_per_execution=min(STEPS, 50),
            run_eagerly=QUICK,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.model.optimizer.save_own_variables(self.start)

    def run(self, task, seed, rate):
        """Return the errors on validation and test, over the variance, and the load."""
        task = Task(task, seed)
        keras.utils.set_random_seed(seed)
        self.model.set_weights(build(self.levels, self.e).get_weights())
        self.model.optimizer.load_own_variables(self.start)
        self.model.optimizer.learning_rate.assign(rate)
        rows, targets = task.draw(BATCH * STEPS, seed + 100)
        self.model.fit(rows, targets, batch_size=BATCH, shuffle=False, verbose=0)
        found = {}
        for window, draw_seed in (("validation", 200), ("test", 300)):
            rows, targets = task.draw(4096, seed + draw_seed)
            errors = self.model.predict_on_batch(rows) - targets
            found[window] = np.mean(errors**2) / np.var(targets)
        routing, _ = self.model.get_layer("moe").route(rows)
        chosen = np.bincount(np.ravel(routing.expert_indices), minlength=self.e)
        return {
            "seed": seed,
            "rate": rate,
            **found,
            "load CV": chosen.std() / chosen.mean(),
            "unused": np.mean(chosen < 0.01 * chosen.mean()),
        }


runs = {(e, levels): Runs(levels, e) for e in COUNTS for levels in LEVELS}
tuned = {}
for cell in product(COUNTS, LEVELS, TASKS):
    tried = [runs[cell[:2]].run(cell[2], 0, rate) for rate in RATES]
    tuned[cell] = min(tried, key=lambda found: found["validation"])

# %%
results = []
for (e, levels, task), first in tuned.items():
    others = [
        runs[e, levels].run(task, seed, first["rate"]) for seed in range(1, SEEDS)
    ]
    cell = {"task": task, "e": e, "router": levels}
    results += [{**cell, **found} for found in (first, *others)]
results = pd.DataFrame(results)


def spread(values):
    return f"{values.mean():.3f} ± {values.std(ddof=0):.3f}"


by_cell = results.groupby(["task", "e", "router"])
print(f"mean ± standard deviation of {SEEDS} seeds; test: error over the variance")
print(
    by_cell.agg(
        {"rate": "first", "test": spread, "load CV": spread, "unused": spread}
    ).to_string()
)

# %% [markdown]
"""
The paired differences between the layers, two levels less flat, with their standard
errors: below zero, two levels are better, or better balanced.
"""


# %%
def difference(column):
    table = results.pivot_table(
        index=["task", "e", "seed"], columns="router", values=column
    )
    return table["two levels"] - table["flat"]


def with_error(values):
    error = values.std() / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():+.3f} ({error:.3f})"


print(
    pd.DataFrame(
        {
            f"{column}: two levels - flat": difference(column)
            .groupby(["task", "e"])
            .agg(with_error)
            for column in ("test", "load CV")
        }
    ).to_string()
)

figure, axes = plt.subplots(
    1, 3, figsize=(11, 3), dpi=80, layout="constrained", sharex=True
)
shown = (("groups", "test"), ("no groups", "test"), ("groups", "load CV"))
for ax, (task, column) in zip(axes, shown, strict=True):
    for place, levels in enumerate(LEVELS):
        cell = results[(results["task"] == task) & (results["router"] == levels)]
        means = cell.groupby("e")[column].mean()
        ax.plot(range(len(means)), means, color=f"C{place}", label=levels)
        where = cell["e"].map({e: i for i, e in enumerate(COUNTS)})
        ax.plot(where + 0.06 * place, cell[column], "o", color=f"C{place}", alpha=0.5)
    ax.set_xticks(range(len(COUNTS)), COUNTS)
    name = "test error / variance" if column == "test" else column
    ax.set(title=f"{task}: {name}", xlabel="experts", ylim=(0, None))
axes[0].legend()
plt.show()

# %% [markdown]
"""
## The router's share of the time

Forward passes of the whole layer and of its router alone, of a more usual size: 2,048
rows of 128 features, experts of 256 hidden units. They alternate; the median of each.
CPU time of one thread, on a machine that also had other work: times are rough.
"""


# %%
def timed(functions, rows):
    taken = {name: [] for name in functions}
    for repeat in range(REPEATS + 2):
        for name, function in functions.items():
            started = time.process_time()
            function(rows)
            if repeat >= 2:  # the first calls trace
                taken[name].append(time.process_time() - started)
    return {name: 1e3 * np.median(seconds) for name, seconds in taken.items()}


SIZE = 16 if QUICK else 128
rows = tf.random.stateless_normal((16 * SIZE, SIZE), (0, 0))
times = {}
for e in COUNTS:
    units = (2 * SIZE, SIZE)
    layers = {levels: layer(levels, e, units) for levels in LEVELS}
    functions = {}
    for levels, made in layers.items():
        made(rows)
        functions[levels, "router"] = tf.function(
            lambda x, made=made: made.router(x)[:2]
        )
        functions[levels, "layer"] = tf.function(lambda x, made=made: made(x))
    measured = timed(functions, rows)
    times[e] = {
        f"{levels}, {what}": value
        for levels in layers
        for what, value in (
            ("router", measured[levels, "router"]),
            ("layer", measured[levels, "layer"]),
            ("share", measured[levels, "router"] / measured[levels, "layer"]),
        )
    }
times = pd.DataFrame(times).T
times.index.name = "e"
print(f"milliseconds of CPU time for {len(rows):,} rows, and the router's share")
print(times.to_string(float_format="%.2f"))

# %%
figure, ax = plt.subplots(figsize=(5.5, 2.8), dpi=80, layout="constrained")
for place, levels in enumerate(LEVELS):
    where = np.arange(len(COUNTS)) + 0.4 * place - 0.2
    ax.bar(where, times[f"{levels}, layer"], 0.36, color=f"C{place}", alpha=0.4)
    ax.bar(where, times[f"{levels}, router"], 0.36, color=f"C{place}", label=levels)
ax.set_xticks(range(len(COUNTS)), COUNTS)
ax.set(xlabel="experts", ylabel="ms", title="layer (pale), router (full)")
ax.legend()
plt.show()

# %% [markdown]
"""
## Results

Mean and standard deviation, or difference and standard error, of 5 seeds.

- **Quality.** A flat router has the lower error with 16 and 64 experts: by 0.021
  (0.009) and 0.016 (0.003) if the task has groups, by 0.037 (0.006) and 0.031 (0.003)
  if not. With 256 experts there is no clear difference: -0.000 (0.004) and +0.015
  (0.009). On a task with groups, two levels lose less, but they do not win.
- **Balance.** With the same loss weight, two levels use more of many experts: with 256
  and groups, 0.122 of the experts are unused, with a flat router 0.545; the CV of the
  load is 1.454 against 1.997. With 16 experts there is no such advantage.
- **Cost.** By formula two levels need 768 multiply-adds per row for 256 experts, a flat
  router 4096. The library computes 4352, because it computes all gates, and then
  chooses twice: its router takes 0.41 of the layer's time, a flat one 0.23.
- **More experts at equal cost** reduce the error as long as there are kinds of rows to
  divide: without groups from 0.424 (16 experts) to 0.328 (64) and 0.285 (256). With
  groups the error does not fall from 64 to 256.

So `MoE` is the default also for many experts. `HierarchicalMoE` is for the case that a
flat router leaves experts unused. Nearly all runs chose the largest of the three
learning rates: with a larger one, or a longer training, all errors may be lower.
"""
