# %% [markdown]
"""
# Sparse MoE: routers, capacity and load balance

In a sparse mixture, each token (a row) is processed by a few experts, which a router
selects. The main failure is *collapse*: an expert that gets more tokens improves faster
and gets even more tokens, until a few experts process all of them. This notebook shows
a collapse, the methods against it, and the cost of imbalance if experts have a
capacity.
"""

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from keras_moe.layers import MoE

# Small settings for the tests; the outputs below are those of the full settings.
# With these few steps, tracing a graph does not pay (`run_eagerly`).
QUICK = os.environ.get("KERAS_MOE_NOTEBOOK_QUICK") == "1"
ROWS, EPOCHS, EVERY = (512, 1, 1) if QUICK else (16_384, 12, 8)
NUM_EXPERTS, BATCH = 8, 256

# %% [markdown]
"""
## Tokens of 16 kinds with unequal frequencies

Real tokens are not uniformly distributed: a few kinds are most of the traffic. Here,
each kind has a centre in 16 dimensions and its own wave as label; the probability of
the i-th kind is proportional to `1 / i`.
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
## Recording the load

The model is a Dense layer, a mixture of eight experts, and one output unit. During
training, a callback routes the test tokens every few steps and records the *load* of
each expert, its fraction of all choices.
"""


# %%
def build(seed=0, **settings):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((16,))
    features = keras.layers.Dense(32, activation="relu", name="features")(inputs)
    moe = MoE(
        num_experts=NUM_EXPERTS,
        expert_units=(32, 32),
        seed=seed,
        name="moe",
        **settings,
    )
    hidden = keras.layers.Activation("relu")(moe(features))
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def route(model, tokens):
    return model.get_layer("moe").router(model.get_layer("features")(tokens))


def load_of(routing):
    if hasattr(routing, "token_indices"):  # expert choice: all slots are filled
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
## Collapse, and the load balancing loss

Top-1 routing without a balancing loss, then with the load balancing loss of the Switch
Transformer (`load_balancing_loss_weight`), at the default weight of 0.01 and at 0.1.
Each colour is an expert, its height the load; the dotted lines are equal loads.
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
        f"{name}: the largest load is {watch.loads[0].max():.2f} initially and "
        f"{watch.loads[-1].max():.2f} finally; {used} of 8 experts are used"
    )

# %% [markdown]
"""
## Other routers

With `top_k=2` each token has a second expert, which makes collapse milder. The routers
differ in their balancing:

- `"top_k"`: the loss above;
- `"noisy_top_k"`: learned noise explores other experts; two losses, on importance and
  load (Shazeer et al. 2017);
- `"bias_balanced"`: no loss. A bias, used for selection only, is increased for experts
  with a low load and decreased for those with a high load (DeepSeek-V3);
- `"sinkhorn"`: the assignments of a training batch are balanced by Sinkhorn iterations;
  in inference each token has its best experts (Clark et al. 2022);
- `"expert_choice"`: experts choose tokens; loads are equal by construction (Zhou et al.
  2022).
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
The load's coefficient of variation (CV) is its standard deviation divided by its mean:
0 for equal loads, 2.65 if one of eight experts has all tokens. The errors are for one
seed and are not a ranking of the routers.
"""

# %%
table = pd.DataFrame(
    {
        name: {
            "initial CV": np.std(watch.loads[0]) * NUM_EXPERTS,
            "final CV": np.std(watch.loads[-1]) * NUM_EXPERTS,
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
Expert choice has equal loads, but the number of experts per token varies and may be 0.
The output for such a token is zero (a residual connection around the layer then passes
it on).
"""

# %%
routing = route(runs["expert choice"][0], test[0][:BATCH])
chosen_by = np.bincount(np.asarray(routing.token_indices).ravel(), minlength=BATCH)
counts = np.bincount(chosen_by, minlength=NUM_EXPERTS + 1)
figure, ax = plt.subplots(figsize=(5, 2.6), dpi=80, layout="constrained")
ax.bar(range(len(counts)), counts / BATCH)
ax.set(xlabel="experts per token", ylabel="fraction of the tokens")
plt.show()
print(
    f"a token has {chosen_by.mean():.2f} experts on average, at most {chosen_by.max()}"
)
print(f"tokens that no expert chose: {counts[0]} of {BATCH}")

# %% [markdown]
"""
## Capacity

`dispatch="split"` and `"blocked"` compute all tokens of each expert, without dropping.
With a *capacity*, which gives static shapes, an expert has `capacity_factor * k * n /
e` slots; choices above that are dropped and contribute zero. With a factor of 1, equal
loads fit exactly.

The trained models are evaluated again with several factors, with the same weights.
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
axes[0].set(xlabel="capacity factor", ylabel="fraction of choices dropped")
axes[1].set(xlabel="capacity factor", ylabel="test error", ylim=(0, None))
axes[0].legend()
plt.show()

dropped = pd.DataFrame({name: m["dropped"] for name, m in measured.items()})
print("fraction of choices dropped, by capacity factor")
print(dropped.to_string(float_format="%.3f"))
errors = pd.DataFrame({name: m["error"] for name, m in measured.items()})
print("test error, by capacity factor")
print(errors.to_string(float_format="%.3f"))

# %% [markdown]
"""
## The router z-loss

A softmax is invariant to a shift of all logits of a token, hence the logits may become
large, and large logits are rounded coarsely in half precision. `router_z_loss_weight`
adds the squared log-sum-exp of the logits, averaged over tokens (Zoph et al. 2022). The
plots show the log-sum-exp and the largest absolute logit of a token, both averaged over
the test tokens.
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
cv = np.std(runs[shown[-1]][1].loads[-1]) * NUM_EXPERTS
print(f"with the z-loss: CV {cv:.3f}, test error {error(runs[shown[-1]][0]):.3f}")

# %% [markdown]
"""
## Results

- **Collapse.** Without a balancing loss, top-1 routing finally used 3 of 8 experts, one
  of which had 0.67 of all tokens. The loss with its default weight of 0.01 reduced the
  collapse (4 experts are used), and with 0.1 prevented it: 8 experts, with a largest
  load of 0.17.
- **Balance is not accuracy.** The balanced router has the larger error, 0.083 against
  0.063: the loss also moves tokens to less suitable experts. A second expert per token
  helped more (0.037, without any loss).
- **Balance matters with a capacity.** With a factor of 1.25, top-2 routing without the
  loss drops 0.132 of the choices, with the loss 0.062, and balanced by a bias 0.000;
  the errors are 0.088, 0.069 and 0.048. With a factor of 3, which drops nothing, the
  unbalanced router is the best of the three, with 0.037.
- **Without a loss**, the bias reached a CV of 0.038; noise with two losses reached
  0.066. Sinkhorn balances only in training: in inference the CV is 0.586.
- **Expert choice** is balanced by construction. A token had 2.00 experts on average and
  at most 5; all 256 tokens were chosen.
- **z-loss.** As intended, the final log-sum-exp is 0.03, without the loss 2.53. The
  largest absolute logit, however, is larger with it (4.32 against 1.98): for a
  log-sum-exp of 0, the logits became negative. The largest of all, 5.29, is that of the
  collapsed router. The error rose from 0.039 to 0.046.

These results are for one seed of one small problem: the loads are typical of the
routers, but the errors are not a ranking.
"""
