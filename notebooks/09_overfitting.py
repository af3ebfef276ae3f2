# %% [markdown]
"""
# Too many experts on little data

A sparse mixture has the parameters of all its experts, but each row trains only a few
of them. With `e` experts, one for each row, and even loads, an expert sees `1 / e` of
the rows. With much data this is the point of the layer. With little data it may
overfit.

This notebook looks at 150 images of digits, and compares what may help: dropout
within experts, balance, shared experts, fewer experts, weight decay, early stopping.
"""

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

from keras_moe import telemetry
from keras_moe.layers import MoE

# Small settings for the tests; the outputs below are those of the full settings.
QUICK = os.environ.get("KERAS_MOE_NOTEBOOK_QUICK") == "1"
SEEDS, ROUNDS, EPOCHS, TUNING_SEEDS, KINDS = (
    (1, 1, 1, 1, 1) if QUICK else (12, 10, 100, 3, 3)
)
ROWS, BATCH, WIDTH = 150, 50, 32

# %% [markdown]
"""
## Data and model

The images are split once: 797 to draw training rows from, 300 for validation, 700 for
the test. Each seed draws its own 150 training rows, and sets weights and order. So the
spread over seeds includes which rows one happens to have.

The model is a Dense layer, a mixture in which each row has one expert (`top_k=1`), and
ten logits. Whatever `e` is, a row costs the same, except for the router.
"""

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
order = np.random.default_rng(0).permutation(len(images))
pool, validation, test = np.split(order, [797, 1097])


def draw(seed):
    return np.random.default_rng(seed).choice(pool, ROWS, replace=False)


def build(experts, **settings):
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(WIDTH, activation="relu")(inputs)
    moe = MoE(experts, (WIDTH, WIDTH), top_k=1, dispatch="dense", **settings)
    hidden = keras.layers.Activation("relu")(moe(hidden))
    return keras.Model(inputs, keras.layers.Dense(10)(hidden))


print(f"majority class of the test: {np.bincount(labels[test]).max() / 700:.3f}")
for e in (1, 4, 16, 64):
    router, others = WIDTH * e, 64 * WIDTH + 2 * WIDTH**2 + WIDTH * 10
    print(
        f"{e:2} experts: {build(e).count_params():,} parameters; "
        f"{others:,} multiply-adds per row and {router:,} in the router"
    )

# %% [markdown]
"""
With a matrix this small, computing all experts and using one (`dispatch="dense"`) is
the fastest on a CPU; the results are those of the other dispatches.

All runs take 100 epochs. After every 10, the mean log loss and the accuracy on the
training rows, on validation and on the test are recorded. Whatever is tuned, is tuned
by the mean loss of three seeds on validation after the last epoch.
"""


# %%
class Runs:
    """The runs of one setting: one model, traced once, new weights for each seed."""

    def __init__(self, experts, weight_decay=0.0, **settings):
        self.arguments = {"experts": experts, **settings}
        self.model, self.start = build(**self.arguments), {}
        self.found, self.used = {}, {}  # by seed and rate
        self.model.compile(
            keras.optimizers.AdamW(weight_decay=weight_decay),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=EPOCHS // ROUNDS * ROWS // BATCH,
            run_eagerly=QUICK,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.model.optimizer.save_own_variables(self.start)

    def get(self, seed, rate):
        """Return losses and accuracies (2, rounds, 3): training, validation, test."""
        if (seed, rate) not in self.found:
            self.found[seed, rate] = self._run(seed, rate)
        return self.found[seed, rate]

    def _run(self, seed, rate):
        keras.utils.set_random_seed(seed)
        self.model.set_weights(build(**self.arguments).get_weights())
        self.model.optimizer.load_own_variables(self.start)
        self.model.optimizer.learning_rate.assign(rate)
        rows, rng = draw(seed), np.random.default_rng(seed)
        measured = []
        for _ in range(ROUNDS):
            shuffled = [rng.permutation(rows) for _ in range(EPOCHS // ROUNDS)]
            shuffled = np.concatenate(shuffled)
            self.model.fit(
                *(images[shuffled], labels[shuffled]),
                batch_size=BATCH,
                shuffle=False,
                verbose=0,
            )
            measured.append(self._measure(rows))
        (mixture,) = telemetry.observe(self.model, images[rows])
        self.used[seed, rate] = np.sum(mixture.usage > 0)
        return np.array(measured).transpose(1, 0, 2)

    def _measure(self, rows):
        seen = np.concatenate([rows, validation, test])
        logits = self.model.predict_on_batch(images[seen]).astype("float64")
        right = logits[np.arange(len(seen)), labels[seen]]
        losses = np.logaddexp.reduce(logits, axis=1) - right
        hits = logits.argmax(axis=1) == labels[seen]
        parts = [ROWS, ROWS + len(validation)]
        return [[x.mean() for x in np.split(of, parts)] for of in (losses, hits)]


def validation_loss(runs, rate):
    """Return the mean over the tuning seeds of the loss after the last epoch."""
    return np.mean([runs.get(seed, rate)[0, -1, 1] for seed in range(TUNING_SEEDS)])


def all_seeds(runs, rate):
    return np.array([runs.get(seed, rate) for seed in range(SEEDS)])


# %% [markdown]
"""
## More experts, larger gap

The learning rate of each `e` is the best of three on validation.
"""

# %%
RATES = (1e-3, 3e-3, 1e-2)[:KINDS]
COUNTS = (1, 4, 16, 64)[-KINDS - 1 :]
by_count, rate_of, runs_of = {}, {}, {}
for e in COUNTS:
    runs_of[e] = runs = Runs(e)
    rate_of[e] = min(RATES, key=lambda rate: validation_loss(runs, rate))
    by_count[e] = all_seeds(runs, rate_of[e])


def spread(values):
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def summary(results):
    """Results (seeds, 2, rounds, 3) as a row of a table, after the last round."""
    loss, accuracy = results[:, 0, -1], results[:, 1, -1]
    return {
        "training loss": spread(loss[:, 0]),
        "test loss": spread(loss[:, 2]),
        "gap": spread(loss[:, 2] - loss[:, 0]),
        "training accuracy": spread(accuracy[:, 0]),
        "test accuracy": spread(accuracy[:, 2]),
    }


def used(runs, rate):
    """Return the number of experts in use for each seed, after the last round."""
    return np.array([runs.used[seed, rate] for seed in range(SEEDS)])


table = pd.DataFrame({e: summary(results) for e, results in by_count.items()}).T
table.insert(0, "rate", list(rate_of.values()))
table["experts used"] = [spread(used(runs_of[e], rate_of[e])) for e in COUNTS]
table.index.name = "experts"
print(f"mean ± standard deviation of {SEEDS} seeds, after {EPOCHS} epochs")
print(table.to_string())

# %% [markdown]
"""
*Experts used* are those that at least one training row chooses after the last epoch.

The rates differ, so the table compares two things at once. Here is each rate for all
numbers of experts:
"""

# %%
table = pd.DataFrame(
    [
        {"rate": rate, "experts": e, **summary(all_seeds(runs_of[e], rate))}
        for rate in RATES
        for e in COUNTS
    ]
)
print(table.set_index(["rate", "experts"]).to_string())

# %% [markdown]
"""
The log loss over the training, on the training rows (dashed) and on the test (solid):
the mean of the seeds. On the right, one point for each seed.
"""

# %%
figure, axes = plt.subplots(
    1, 2, figsize=(10, 3.2), dpi=80, layout="constrained", sharey=True
)
epochs = EPOCHS // ROUNDS * np.arange(1, ROUNDS + 1)
for place, (e, results) in enumerate(by_count.items()):
    color, mean = f"C{place}", results[:, 0].mean(axis=0)
    axes[0].plot(epochs, mean[:, 0], "--", color=color)
    axes[0].plot(epochs, mean[:, 2], color=color, label=f"{e} experts")
    axes[1].plot([place] * SEEDS, results[:, 0, -1, 2], "o", color=color, alpha=0.6)
axes[0].set(xlabel="epoch", ylabel="log loss", ylim=(0, None))
axes[0].legend(fontsize=8)
axes[1].set(xlabel="experts", title="test, last epoch")
axes[1].set_xticks(range(len(COUNTS)), COUNTS)
plt.show()

# %% [markdown]
"""
## What helps

The mixture of 64 experts is to be cured. Each cure is tried alone, with three
strengths, of which the best on validation is run with all seeds:

- *dropout*: of the hidden units of the experts (`dropout`);
- *balance*: a larger weight of the load balancing loss (`load_balancing_loss_weight`;
  0.01 is the default);
- *shared experts*: experts for all rows beside the 64 (`num_shared_experts`); each adds
  the cost of one expert;
- *fewer experts*;
- *weight decay*, of AdamW;
- *early stopping*: the weights of the best of ten rounds on validation, for each seed.
"""

# %%
CURES = {
    "dropout": [{"dropout": x} for x in (0.2, 0.5, 0.8)],
    "balance": [{"load_balancing_loss_weight": x} for x in (0.0, 0.1, 1.0)],
    "shared experts": [{"num_shared_experts": x} for x in (1, 2, 4)],
    "fewer experts": [{"experts": x} for x in (1, 4, 16)],
    "weight decay": [{"weight_decay": x} for x in (0.1, 1.0, 3.0)],
}
ILL = COUNTS[-1]
last = {"none": by_count[ILL][:, :, -1]}  # (seeds, 2, 3)
chosen = {"none": ""}
experts_used = {"none": used(runs_of[ILL], rate_of[ILL])}
for cure, strengths in CURES.items():
    tried = [Runs(**{"experts": ILL, **strength}) for strength in strengths[:KINDS]]
    best = min(tried, key=lambda runs: validation_loss(runs, rate_of[ILL]))
    last[cure] = all_seeds(best, rate_of[ILL])[:, :, -1]
    experts_used[cure] = used(best, rate_of[ILL])
    chosen[cure] = ", ".join(str(x) for x in strengths[tried.index(best)].values())
stop = by_count[ILL][:, 0, :, 1].argmin(axis=1)
last["early stopping"] = by_count[ILL][np.arange(SEEDS), :, stop]
chosen["early stopping"] = f"epoch {np.median(epochs[stop]):.0f} (median)"

# %% [markdown]
"""
Differences to no cure are paired: the same seed has the same rows. Their intervals are
95% bootstrap intervals of the mean over the seeds.
"""


# %%
def interval(values):
    picks = np.random.default_rng(0).integers(0, SEEDS, (10_000, SEEDS))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975])


rows, bounds = {}, {}
for cure, results in last.items():
    loss, accuracy = results[:, 0], results[:, 1]
    difference = loss[:, 2] - last["none"][:, 0, 2]
    bounds[cure] = (difference.mean(), *interval(difference))
    gained = accuracy[:, 2] - last["none"][:, 1, 2]
    rows[cure] = {
        "strength": chosen[cure],
        "experts used": spread(experts_used[cure]) if cure in experts_used else "",
        "test loss": spread(loss[:, 2]),
        "gap": f"{(loss[:, 2] - loss[:, 0]).mean():.3f}",
        "change of loss": "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bounds[cure]),
        "accuracy": spread(accuracy[:, 2]),
        "change of accuracy": "{:+.3f} [{:+.3f}, {:+.3f}]".format(
            gained.mean(), *interval(gained)
        ),
    }
print(pd.DataFrame(rows).T.to_string())

# %%
figure, ax = plt.subplots(figsize=(7, 3), dpi=80, layout="constrained")
names = [cure for cure in bounds if cure != "none"]
for place, cure in enumerate(names):
    mean, low, high = bounds[cure]
    ax.plot([low, high], [place, place], color="C0")
    ax.plot(mean, place, "o", color="C0")
ax.axvline(0, color="grey", linewidth=0.8)
ax.set_yticks(range(len(names)), names)
ax.invert_yaxis()
ax.set(xlabel="change of the test loss (left is better)")
plt.show()

# %% [markdown]
"""
## Results

Mean and standard deviation of 12 seeds; intervals are those above.

- **More experts are worse on the test.** With the rates chosen, the test loss rises
  from 0.353 ± 0.079 with one expert to 0.443 ± 0.082 with 4, 0.488 ± 0.135 with 16, and
  0.821 ± 0.333 with 64, and the accuracy falls from 0.897 to 0.838. 64 experts have
  another rate, 0.003, but this is not the reason: the loss rises with the number of
  experts at each of the three rates, at 0.001 to 0.880 ± 0.199.
- **1 to 16 experts fit the training rows, 64 do so less well.** Up to 16 experts, the
  training accuracy is at least 0.999 at every rate, and the gap grows: they overfit. 64
  experts have a training accuracy of 0.967 to 0.976. They overfit more *and* fit worse:
  at rate 0.001 the gap is 0.754 (one expert: 0.316), the training loss 0.126 (0.036).
- **Few of the experts are used** after the last epoch: 1.333 ± 0.471 of 4, 1.500 ±
  0.500 of 16, 6.083 ± 1.115 of 64. So the rows are not divided by `e`, and why 4 and 16
  experts are worse than one, if hardly more than one is used, is not shown here.
- **What helps is to have all rows train one expert.** One expert instead of 64 changes
  the loss by -0.409 [-0.556, -0.297], four shared experts by -0.392 [-0.596, -0.250].
  Both have an accuracy of 0.900. Shared experts cost operations for every row.
- **Less balance helps, not more.** Of four weights of the loss, the default among them,
  none at all was best: -0.297 [-0.486, -0.149]. Then 1.250 ± 0.595 experts are used,
  with the default 6.083 ± 1.115: it is nearly one expert for all rows, too.
- **Not shown to help:** dropout within experts, +0.058 [-0.175, +0.231], weight decay,
  -0.117 [-0.276, +0.020], and early stopping, -0.059 [-0.155, +0.015], which mostly
  stopped nothing: at least half of the seeds had the lowest validation loss at epoch
  100.
- **No cure is better than a single expert**, the dense layer. With so few rows a sparse
  mixture does not pay.

The strengths chosen for shared experts, balance and fewer experts are at the end of
their scales. The cures have the rate of 64 experts, 0.003, at which one expert has a
test loss of 0.413; at its own rate it has 0.353.
"""
