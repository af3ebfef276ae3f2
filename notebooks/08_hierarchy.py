# %% [markdown]
"""
# Two levels of gates or one?

With many experts a router has many outputs. `HierarchicalMoE` chooses in two steps, as
[Jordan and Jacobs (1994)](https://doi.org/10.1162/neco.1994.6.2.181) and
[Shazeer et al. (2017), appendix B](https://arxiv.org/abs/1701.06538): first groups,
then experts within them. Is it better or cheaper than `MoE`, whose single gate sees all
experts? This notebook compares them with 16, 64 and 256 experts, each row with four of
them, on a task that has groups and on one that has none; and both with dense layers of
equal operations and of equal parameters.
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
RATES = (1e-2,) if QUICK else (1e-3, 3e-3, 1e-2, 3e-2)
TUNING = (10,) if QUICK else (10, 11)  # seeds, others than the five compared ones
TASKS, LEVELS = ("groups", "no groups"), ("flat", "two levels")
DENSE = ("dense, equal FLOPs", "dense, equal parameters")
BODIES = (*LEVELS, *DENSE)

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
of all. Experts cost the same, so do all other parts but the router. A dense layer has
one hidden layer, like an expert: for each `e`, one with the multiply-adds of four
experts and the flat router, and one with the parameters of all `e` experts and the flat
router.

By formula, a flat router has `d e` multiply-adds per row. A hierarchical one needs
`d (g + 2 e / g)` with `g` groups, if it computes the gates of the chosen groups alone.
The library computes the gates of all groups, `d (g + e)`, in one matrix product: for
routers of this size that is faster than to gather the kernels of each row's groups.

The equal FLOPs are those of a layer that skips the experts which a row does not need,
as both layers do by default. Here they compute all experts: these are so small that
this takes about as long.
"""


# %%
def layer(levels, e, units=(WIDTH, WIDTH), dispatch="auto"):
    settings = {"dispatch": dispatch, "name": "moe"}
    if levels == "flat":
        return MoE(e, units, top_k=4, **settings)
    groups = int(np.sqrt(e))
    return HierarchicalMoE(groups, e // groups, units, **settings)


def hidden_units(name, e):
    """Hidden units of a dense layer."""
    per_unit, router = FEATURES + WIDTH, FEATURES * e
    if name == "dense, equal FLOPs":
        return round((4 * WIDTH * per_unit + router) / per_unit)
    # A hidden unit has a bias; an expert has WIDTH hidden units and an output bias.
    experts = e * (WIDTH * (per_unit + 1) + WIDTH)
    return round((experts + router - WIDTH) / (per_unit + 1))


def build(body, e):
    inputs = keras.Input((FEATURES,))
    if body in LEVELS:
        x = layer(body, e, dispatch="dense")(inputs)
    else:
        x = keras.layers.Dense(hidden_units(body, e), activation="relu")(inputs)
        x = keras.layers.Dense(WIDTH)(x)
    x = keras.layers.Activation("relu")(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def multiply_adds(name, e):
    return hidden_units(name, e) * (FEATURES + WIDTH)


parameters = {
    e: {body: build(body, e).count_params() for body in BODIES} for e in COUNTS
}
parameters = pd.DataFrame(parameters).T
costs = pd.DataFrame(
    {
        e: {
            "experts": 4 * (FEATURES * WIDTH + WIDTH**2),
            "flat router": FEATURES * e,
            "two levels, by formula": int(FEATURES * (e**0.5 + 2 * e**0.5)),
            "two levels, computed": int(FEATURES * (e**0.5 + e)),
            **{name: multiply_adds(name, e) for name in DENSE},
        }
        for e in COUNTS
    }
).T
parameters.index.name = costs.index.name = "e"
print("parameters of the model")
print(parameters.to_string())
print("\nmultiply-adds per row: four experts, routers, dense layers")
print(costs.to_string())

# %% [markdown]
"""
## Training

Same steps, same rows for all bodies. The learning rate of each body, `e` and task is
the one of four with the lowest mean error on validation, with two tuning seeds that are
not among the five of the comparison. Both mixtures have the load balancing loss with
its default weight. Steps are timed in CPU time, the least of the seeds.
"""


# %%
class Runs:
    """The runs of one body: traced once, new weights for each seed and task."""

    def __init__(self, body, e):
        self.body, self.e, self.start = body, e, {}
        self.model = build(body, e)
        self.model.compile(
            keras.optimizers.Adam(1e-3),
            "mse",
            steps_per_execution=min(STEPS, 50),
            run_eagerly=QUICK,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.model.optimizer.save_own_variables(self.start)

    def run(self, task, seed, rate, steps=STEPS):
        """Return the errors on validation and test, over the variance, and the load."""
        task = Task(task, seed)
        keras.utils.set_random_seed(seed)
        self.model.set_weights(build(self.body, self.e).get_weights())
        self.model.optimizer.load_own_variables(self.start)
        self.model.optimizer.learning_rate.assign(rate)
        rows, targets = task.draw(BATCH * steps, seed + 100)
        started = time.process_time()
        self.model.fit(rows, targets, batch_size=BATCH, shuffle=False, verbose=0)
        step = 1e3 * (time.process_time() - started) / steps
        found = {"seed": seed, "rate": rate, "ms per step": step}
        for window, draw_seed in (("validation", 200), ("test", 300)):
            rows, targets = task.draw(4096, seed + draw_seed)
            errors = self.model.predict_on_batch(rows) - targets
            found[window] = np.mean(errors**2) / np.var(targets)
        if self.body in DENSE:
            return found
        routing, _ = self.model.get_layer("moe").route(rows)
        chosen = np.bincount(np.ravel(routing.expert_indices), minlength=self.e)
        return {
            **found,
            "load CV": chosen.std() / chosen.mean(),
            "unused": np.mean(chosen < 0.01 * chosen.mean()),
        }


runs = {(e, body): Runs(body, e) for e, body in product(COUNTS, BODIES)}


def tune(task, e, body, steps=STEPS):
    """Return the mean error of the tuning seeds on validation by rate."""

    def error(rate):
        tried = [runs[e, body].run(task, seed, rate, steps) for seed in TUNING]
        return np.mean([found["validation"] for found in tried])

    return {rate: error(rate) for rate in RATES}


def compare(tuned, steps=STEPS):
    """Run all seeds of each row of a table of errors by rate."""
    results = []
    for (task, e, body), rate in tuned.idxmin(axis=1).items():
        for seed in range(SEEDS):
            found = runs[e, body].run(task, seed, rate, steps)
            results.append({"task": task, "e": e, "body": body, **found})
    return pd.DataFrame(results)


def by_rate(cells, steps=STEPS):
    """Tune all cells; print and return the table of errors by rate."""
    tuned = pd.DataFrame({cell: tune(*cell, steps) for cell in cells}).T
    tuned.index.names, tuned.columns.name = ("task", "e", "body"), "rate"
    print(f"validation, mean of {len(TUNING)} tuning seeds: error over the variance")
    print(tuned.to_string(float_format="%.3f"))
    return tuned


tuned = by_rate(product(TASKS, COUNTS, BODIES))

# %%
results = compare(tuned)


def spread(values):
    if values.isna().any():  # a dense layer has no load
        return "-"
    return f"{values.mean():.3f} ± {values.std(ddof=0):.3f}"


def summary(results):
    by_cell = results.groupby(["task", "e", "body"], sort=False)
    columns = {
        "rate": "first",
        "test": spread,
        "load CV": spread,
        "unused": spread,
        "ms per step": lambda values: f"{values.min():.1f}",
    }
    return by_cell.agg(columns).to_string()


print(f"mean ± standard deviation of {SEEDS} seeds; test: error over the variance")
print(summary(results))

# %% [markdown]
"""
The paired differences to the flat router, with their standard errors. Above zero the
flat router is better, or better balanced.
"""


# %%
def with_error(values):
    error = values.std() / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():+.3f} ({error:.3f})"


def difference(results, body, column):
    table = results.pivot_table(
        index=["task", "e", "seed"], columns="body", values=column
    )
    return (table[body] - table["flat"]).groupby(["task", "e"]).agg(with_error)


def differences(results):
    found = {b: difference(results, b, "test") for b in results["body"].unique()[1:]}
    return pd.DataFrame(found).to_string()


print("test error: the body less the flat router")
print(differences(results))
print("\nload CV: two levels less the flat router")
print(difference(results, "two levels", "load CV").to_string())

figure, axes = plt.subplots(
    1, 3, figsize=(11, 3), dpi=80, layout="constrained", sharex=True
)
shown = (("groups", "test"), ("no groups", "test"), ("groups", "load CV"))
for ax, (task, column) in zip(axes, shown, strict=True):
    for place, body in enumerate(BODIES if column == "test" else LEVELS):
        cell = results[(results["task"] == task) & (results["body"] == body)]
        means = cell.groupby("e")[column].mean()
        ax.plot(range(len(means)), means, color=f"C{place}", label=body)
        where = cell["e"].map({e: i for i, e in enumerate(COUNTS)})
        ax.plot(where + 0.06 * place, cell[column], "o", color=f"C{place}", alpha=0.5)
    ax.set_xticks(range(len(COUNTS)), COUNTS)
    name = "test error / variance" if column == "test" else column
    ax.set(title=f"{task}: {name}", xlabel="experts", ylim=(0, None))
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
"""
Is this training too short for the dense layers? The same with four times as many steps,
64 experts, and no groups; rates are tuned anew.
"""

# %%
MIDDLE = COUNTS[len(COUNTS) // 2]
longer = by_rate(product(("no groups",), (MIDDLE,), ("flat", *DENSE)), 4 * STEPS)
longer = compare(longer, 4 * STEPS)
print(f"\n{4 * STEPS} steps, mean ± standard deviation of {SEEDS} seeds")
print(summary(longer))
print("\ntest error: the body less the flat router")
print(differences(longer))

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

- **Mixtures are better than dense layers here.** With 16, 64 and 256 experts the dense
  layer of equal FLOPs has a higher error than a flat router: by 0.134 (0.013), 0.193
  (0.006) and 0.222 (0.005) without groups, by 0.096 (0.013), 0.104 (0.003) and 0.093
  (0.006) with groups. The dense layer of equal parameters is worse too: by 0.084
  (0.009), 0.165 (0.006) and 0.228 (0.007), and by 0.044 (0.013), 0.075 (0.008) and
  0.086 (0.011).
- **In part they only learn faster.** With 64 experts and no groups, after the short
  training the dense layer of equal parameters is hardly better than that of equal
  FLOPs, 0.492 against 0.521. After 2400 steps it is much better, 0.199 ± 0.010 against
  0.399 ± 0.026. The flat router is still better, 0.113 ± 0.005: the differences to it
  are +0.086 (0.003) and +0.285 (0.012).
- **They are slower here.** With experts this small, all of them are computed. A step
  with 64 experts and no groups takes 3.0 ms, with the dense layers 0.7 (equal FLOPs)
  and 1.4 (equal parameters). The comparison is at equal steps, not at equal times.
- **More experts** reduce the error as long as there are kinds of rows to divide:
  without groups from 0.424 (16 experts) to 0.328 (64) and 0.285 (256). With groups the
  error hardly falls from 64 to 256, from 0.262 to 0.259.
- **One level is better than two:** by 0.021 (0.009), 0.016 (0.003) and 0.011 (0.005)
  with groups, by 0.037 (0.006) and 0.031 (0.003) without groups; only the +0.015
  (0.009) with 256 experts is less clear. On a task with groups two levels lose less,
  but they do not win.
- **Balance.** With the same loss weight, two levels use more of many experts: with 256
  and groups, 0.122 of the experts are unused, with a flat router 0.492; the CV of the
  load is 1.454 against 2.106. With 16 experts there is no such advantage.
- **Cost of the router.** By formula two levels need 768 multiply-adds per row for 256
  experts, a flat router 4096. The library computes 4352, because it computes all gates,
  and then chooses twice: its router takes 0.40 of the layer's time, a flat one 0.22.

So `MoE` is the default also for many experts. `HierarchicalMoE` is for the case that a
flat router leaves experts unused.

All chosen rates but one are inside the grid: the dense layer with the parameters of 256
experts, without groups, chose the smallest, 0.001, but 0.003 is as good on validation,
0.513.
"""
