# %% [markdown]
"""
# Sparse MoE: routers, capacity and balance, seen

A sparse mixture computes a token (a row) by few experts, and a router chooses them.
That choice can go wrong in one way above all: an expert that gets more tokens learns
more, suits more tokens, gets still more of them, and in the end works alone. This
notebook lets that happen, cures it in several ways, and shows what a router's imbalance
costs where experts have a capacity.
"""

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from keras_moe.layers import MoE

# Small settings, with which the tests run this page; its outputs are of the full ones.
# For so few steps no graph is traced (`run_eagerly`).
QUICK = os.environ.get("KERAS_MOE_NOTEBOOK_QUICK") == "1"
ROWS, EPOCHS, EVERY = (512, 1, 1) if QUICK else (16_384, 12, 8)
NUM_EXPERTS, BATCH = 8, 256

# %% [markdown]
"""
## Tokens of 16 kinds, some of them frequent

Real tokens are not spread evenly: a few kinds are most of the traffic. Each kind here
has a centre in 16 dimensions and a wave of its own as a label, and the i-th kind comes
with a probability in proportion to `1 / i`.
"""

# %%
rng = np.random.default_rng(0)
KINDS = 16
centres = rng.normal(size=(KINDS, 16))
directions = rng.normal(size=(KINDS, 16)) / 4
levels = rng.normal(size=KINDS)
share = 1 / np.arange(1, KINDS + 1)
share /= share.sum()


def draw_tokens(count):
    kind = rng.choice(KINDS, count, p=share)
    offset = 0.5 * rng.normal(size=(count, 16))
    label = levels[kind] + np.sin(2 * np.sum(offset * directions[kind], axis=1))
    tokens = centres[kind] + offset
    return tokens.astype("float32"), label[:, None].astype("float32")


train, test = draw_tokens(ROWS), draw_tokens(4096)
print(
    f"the most frequent kind: {share[0]:.0%} of the tokens; the rarest: {share[-1]:.0%}"
)
print(f"variance of the test labels: {test[1].var():.2f}")

# %% [markdown]
"""
## Watching a router

The model is a layer of features, a mixture of eight experts, one unit. While it
trains, a callback asks the router every few steps where it would send the test tokens,
and notes each expert's share of all choices: its *load*.
"""


# %%
def build(seed=0, **settings):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((16,))
    features = keras.layers.Dense(32, activation="relu", name="features")(inputs)
    moe = MoE(NUM_EXPERTS, (32, 32), seed=seed, name="moe", **settings)
    hidden = keras.layers.Activation("relu")(moe(features))
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def route(model, tokens):
    return model.get_layer("moe").router(model.get_layer("features")(tokens))


def load_of(routing):
    if hasattr(routing, "token_indices"):  # experts chose: all their slots are taken
        return np.full(NUM_EXPERTS, 1 / NUM_EXPERTS)
    chosen = np.asarray(routing.expert_indices).ravel()
    return np.bincount(chosen, minlength=NUM_EXPERTS) / chosen.size


class RouterWatch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps, self.loads, self.logits = [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step % EVERY == 0:
            routing = route(self.model, test[0])
            self.steps.append(step)
            self.loads.append(load_of(routing))
            self.logits.append(np.asarray(routing.router_logits))


def fit(**settings):
    model, watch = build(**settings), RouterWatch()
    model.compile(keras.optimizers.Adam(3e-3), "mse", run_eagerly=QUICK)
    model.fit(*train, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[watch])
    return model, watch


def error(model):
    predictions = model.predict(test[0], batch_size=BATCH, verbose=0)
    return float(np.mean((predictions - test[1]) ** 2))


def draw_load(ax, watch, title):
    colours = plt.get_cmap("tab10").colors
    ax.stackplot(watch.steps, np.transpose(watch.loads), colors=colours)
    for level in np.arange(1, NUM_EXPERTS) / NUM_EXPERTS:
        ax.axhline(level, color="white", linewidth=0.5, linestyle=":")
    ax.set(title=title, xlabel="step", ylim=(0, 1))
    ax.set_xlim(watch.steps[0], watch.steps[-1])


# %% [markdown]
"""
## Collapse, and its cure

Top 1 without any balancing loss, then with the load balancing loss of the Switch
Transformer (`load_balancing_loss_weight`), at the default weight 0.01 and at 0.1. A
colour is an expert, its height its load; the dotted lines are even loads.
"""

# %%
runs = {
    "Switch (top 1), no loss": fit(top_k=1, load_balancing_loss_weight=0.0),
    "Switch, loss 0.01": fit(top_k=1),
    "Switch, loss 0.1": fit(top_k=1, load_balancing_loss_weight=0.1),
}
figure, axes = plt.subplots(
    1, 3, figsize=(11, 2.8), dpi=80, sharey=True, layout="constrained"
)
for ax, (name, (_, watch)) in zip(axes, runs.items(), strict=True):
    draw_load(ax, watch, name)
axes[0].set_ylabel("load")
plt.show()

for name, (_, watch) in runs.items():
    used = sum(watch.loads[-1] > 0.01)
    print(
        f"{name}: the largest load is {watch.loads[0].max():.2f} at first and "
        f"{watch.loads[-1].max():.2f} in the end; {used} of 8 experts are used"
    )

# %% [markdown]
"""
## Other routers

With `top_k=2` a token always has a second expert, so that collapse is milder. The
routers differ in what they do about balance:

- `"top_k"`: the loss above;
- `"noisy_top_k"`: learned noise lets other experts be tried; two losses, on importance
  and load (Shazeer et al. 2017);
- `"bias_balanced"`: no loss at all. A bias, which only selects, rises for experts with
  little load and falls for those with much (DeepSeek-V3);
- `"sinkhorn"`: the choices of a training batch are balanced before they are made; in
  inference each token has its own best (Clark et al. 2022);
- `"expert_choice"`: experts choose tokens, so that loads are equal by construction
  (Zhou et al. 2022).
"""

# %%
runs |= {
    "top 2, no loss": fit(load_balancing_loss_weight=0.0),
    "top 2, loss 0.01": fit(),
    "noisy top 2": fit(router="noisy_top_k"),
    "bias balanced": fit(router="bias_balanced"),
    "Sinkhorn": fit(router="sinkhorn"),
    "expert choice": fit(router="expert_choice"),
}
figure, axes = plt.subplots(
    2, 3, figsize=(11, 5), dpi=80, sharex=True, sharey=True, layout="constrained"
)
for ax, name in zip(axes.flat, list(runs)[3:], strict=True):
    draw_load(ax, runs[name][1], name)
for ax in axes[:, 0]:
    ax.set_ylabel("load")
plt.show()

# %% [markdown]
"""
The load's spread is its standard deviation over its mean: 0 for even loads, 2.65 if one
of eight experts has all. The error is that of one seed and no ranking of routers.
"""

# %%
table = pd.DataFrame(
    {
        name: {
            "spread at first": np.std(watch.loads[0]) * NUM_EXPERTS,
            "spread in the end": np.std(watch.loads[-1]) * NUM_EXPERTS,
            "experts used": sum(watch.loads[-1] > 0.01),
            "test error": error(model),
        }
        for name, (model, watch) in runs.items()
    }
).T
table["experts used"] = table["experts used"].astype(int)
print(table.to_string(float_format="%.3f"))

# %% [markdown]
"""
Expert choice has even loads, and the unevenness goes elsewhere: a token is chosen by
as many experts as want it, which may be none. Such a token passes the layer as zeros
(a residual connection around the layer then carries it).
"""

# %%
routing = route(runs["expert choice"][0], test[0][:BATCH])
chosen_by = np.bincount(np.asarray(routing.token_indices).ravel(), minlength=BATCH)
counts = np.bincount(chosen_by, minlength=NUM_EXPERTS + 1)
figure, ax = plt.subplots(figsize=(5, 2.6), dpi=80, layout="constrained")
ax.bar(range(len(counts)), counts / BATCH)
ax.set(xlabel="experts that chose a token", ylabel="share of the tokens")
plt.show()
print(
    f"a token has {chosen_by.mean():.2f} experts on average, at most {chosen_by.max()}"
)
print(f"tokens that no expert chose: {counts[0]} of {BATCH}")

# %% [markdown]
"""
## Capacity

`dispatch="split"` and `"blocked"` compute exactly the tokens an expert got, however
many. Devices with fixed shapes often want a *capacity* instead: an expert has
`capacity_factor * k * n / e` slots, and what comes when they are full is dropped, which
means that this expert adds nothing to the token. A factor of 1 fits even loads exactly.

The trained models are evaluated again with several factors: the weights stay, only the
dispatch differs.
"""

# %%
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
LIMITED = {
    "top 2, no loss": {"load_balancing_loss_weight": 0.0},
    "top 2, loss 0.01": {},
    "bias balanced": {"router": "bias_balanced"},
}


def limited(name, factor):
    model = build(
        capacity_factor=factor, routing_metrics=["dropped_fraction"], **LIMITED[name]
    )
    model.set_weights(runs[name][0].get_weights())
    model.compile(loss="mse", metrics=["mse"], run_eagerly=QUICK)
    logs = model.evaluate(*test, batch_size=BATCH, verbose=0, return_dict=True)
    return {"dropped": logs["moe_dropped_fraction"], "error": logs["mse"]}


measured = {
    name: pd.DataFrame([limited(name, factor) for factor in FACTORS], index=FACTORS)
    for name in LIMITED
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3), dpi=80, layout="constrained")
for name, by_factor in measured.items():
    for ax, column in zip(axes, by_factor, strict=True):
        ax.plot(by_factor.index, by_factor[column], "o-", label=name)
axes[0].set(xlabel="capacity factor", ylabel="share of choices dropped")
axes[1].set(xlabel="capacity factor", ylabel="test error", ylim=(0, None))
axes[0].legend()
plt.show()

dropped = pd.DataFrame({name: m["dropped"] for name, m in measured.items()})
print("share of choices dropped, by capacity factor")
print(dropped.to_string(float_format="%.3f"))
errors = pd.DataFrame({name: m["error"] for name, m in measured.items()})
print("test error, by capacity factor")
print(errors.to_string(float_format="%.3f"))

# %% [markdown]
"""
## The router z-loss

A softmax does not change when all logits of a token grow by the same amount, so nothing
keeps them where numbers are fine: large ones are rounded coarsely in half precision.
`router_z_loss_weight` adds the square of the logits' log-sum-exp, averaged over tokens
(Zoph et al. 2022). The pictures show the log-sum-exp, and the size of the largest logit
of a token, positive or negative, both as means over the test tokens.
"""

# %%
runs["top 2, loss 0.01, z-loss 0.01"] = fit(router_z_loss_weight=0.01)
shown = ("Switch (top 1), no loss", "top 2, loss 0.01", "top 2, loss 0.01, z-loss 0.01")
measures = {
    "log-sum-exp": lambda logits: np.logaddexp.reduce(logits, axis=1).mean(),
    "largest |logit|": lambda logits: np.abs(logits).max(axis=1).mean(),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3), dpi=80, layout="constrained")
for ax, (title, measure) in zip(axes, measures.items(), strict=True):
    for name in shown:
        watch = runs[name][1]
        values = [measure(logits) for logits in watch.logits]
        ax.plot(watch.steps, values, label=name)
        print(f"{title}, {name}: from {values[0]:.2f} to {values[-1]:.2f}")
    ax.set(title=title, xlabel="step")
    ax.axhline(0, color="grey", linewidth=0.5)
axes[0].legend(fontsize=8)
plt.show()
spread = np.std(runs[shown[-1]][1].loads[-1]) * NUM_EXPERTS
print(
    f"with the z-loss: spread {spread:.3f}, test error {error(runs[shown[-1]][0]):.3f}"
)

# %% [markdown]
"""
## What was seen

- **Collapse.** Without a balancing loss, top 1 ended with 3 of 8 experts, one of which
  had 0.67 of all tokens. The loss at its default weight 0.01 slowed that down (4 are at
  work), at 0.1 it cured it: 8 experts, and the largest load is 0.17.
- **Balance is not accuracy.** The cured router has the larger error, 0.083 against
  0.063: the loss also takes tokens from experts that suit them. What helped more was a
  second expert for each token (0.037, without any loss).
- **Capacity is where balance pays.** At a factor of 1.25 the unbalanced top 2 drops
  0.132 of the choices, with the loss 0.062, balanced by a bias 0.000; the errors
  are 0.088, 0.069 and 0.048. At a factor of 3, where nothing is dropped, the
  unbalanced one is the best of the three, with 0.037.
- **Without a loss** the bias came to a spread of 0.038, and with noise and two losses
  0.066 was reached. Sinkhorn balances in training alone: where tokens have their own
  way again the spread is 0.586.
- **Expert choice** is even by construction. A token had 2.00 experts on average and
  at most 5; of 256 tokens none was left out.
- **z-loss.** It does what its formula says: the log-sum-exp ends at 0.03, without it at
  2.53. That is not the size of the logits, which ended larger with it (4.32 against
  1.98): to bring the log-sum-exp to 0, logits here went below 0. The largest of all,
  5.29, belong to the router that collapsed. The error rose from 0.039 to 0.045.

All of this is one seed of one small problem: the loads are what the routers are made
for and will be found elsewhere, the errors are no ranking.
"""
