# %% [markdown]
"""
# MoE in five minutes

A Dense block uses all of its weights for every row. A *mixture of experts* (MoE) has
several smaller blocks, the experts, and a router that sends each row to a few of them.
The number of experts determines the number of parameters, and `top_k` the cost per row.

This notebook replaces a Dense block by `keras_moe.layers.MoE`, on a two-dimensional
problem that can be plotted, and shows how the experts specialize.
"""

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # for the SavedModel

import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf

from keras_moe.layers import MoE

# Small settings for the tests; the outputs below are those of the full settings.
QUICK = os.environ.get("KERAS_MOE_NOTEBOOK_QUICK") == "1"
ROWS, EPOCHS, SEEDS = (1024, 1, 1) if QUICK else (20_000, 30, 3)

# %% [markdown]
"""
## A piecewise problem

The plane is divided into six regions, the points nearest to each of six centres. In
each region the label is a wave with its own direction. What is learned in one region
does not help in the others, and the label is discontinuous at the borders: a problem
that suits a mixture of experts.
"""

# %%
rng = np.random.default_rng(4)
places = np.array(
    [[-0.65, 0.6], [0.1, 0.7], [0.75, 0.45], [-0.5, -0.35], [0.2, -0.1], [0.55, -0.7]]
)
angles = np.deg2rad([0, 60, 120, 90, 150, 30])
directions = 9 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
offsets = rng.uniform(-1, 1, 6)


def region_of(points):
    distances = np.linalg.norm(points[:, None] - places, axis=-1)
    return distances.argmin(axis=1)


def label_of(points):
    region = region_of(points)
    waves = np.sin(np.sum(directions[region] * points, axis=1))
    return (offsets[region] + waves)[:, None].astype("float32")


def draw_points(count):
    points = rng.uniform(-1, 1, (count, 2)).astype("float32")
    return points, label_of(points)


train, test = draw_points(ROWS), draw_points(5000)
print(f"{ROWS} training rows, {len(test[0])} test rows")
print(f"variance of the test labels: {test[1].var():.3f}")

# %% [markdown]
"""
## Three blocks

The model is a Dense layer, then a block, then one output unit. Three blocks are
compared:

- **narrow**: two Dense layers with about the cost per row of the mixture;
- **wide**: two Dense layers with about as many parameters as the mixture;
- **MoE**: eight experts of two layers; each row is sent to two of them.

The mixture is one line: `MoE(num_experts=8, expert_units=(32, 32), top_k=2)`.
"""

# %%
NUM_EXPERTS, TOP_K = 8, 2


def dense_block(width):
    return keras.Sequential(
        [
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(32),
        ]
    )


def mixture(routing_metrics=()):
    return MoE(
        num_experts=NUM_EXPERTS,
        expert_units=(32, 32),
        top_k=TOP_K,
        routing_metrics=routing_metrics,
        name="moe",
    )


def build(block):
    inputs = keras.Input((2,))
    features = keras.layers.Dense(32, activation="relu", name="features")(inputs)
    hidden = keras.layers.Activation("relu")(block(features))
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


BLOCKS = {
    "narrow": lambda: dense_block(64),
    "wide": lambda: dense_block(256),
    "MoE": lambda: mixture(["load_cv", "router_confidence"]),
}

# %% [markdown]
"""
A matmul of `d` inputs and `u` outputs takes `2 d u` operations per row. In the mixture,
a row uses the router and two experts; the other six are not computed for it.
"""


# %%
def flops(kernels):
    return sum(2 * int(np.prod(kernel.shape[-2:])) for kernel in kernels)


def flops_of_block(model):
    block = model.layers[2]
    if not isinstance(block, MoE):
        return flops(layer.kernel for layer in block.layers)
    return flops([block.router.kernel]) + TOP_K * flops(block.experts.kernels)


costs = pd.DataFrame(columns=["parameters", "operations per row"])
for name, block in BLOCKS.items():
    model = build(block())
    costs.loc[name] = [model.layers[2].count_params(), flops_of_block(model)]
print(costs.to_string())

# %% [markdown]
"""
## Training

A mixture is trained with `fit` like any layer. It adds an auxiliary loss, the load
balancing loss (weight 0.01 by default), which prevents the router from sending most
rows to one expert. With `routing_metrics`, `fit` logs two metrics: `load_cv`, the
coefficient of variation of the expert loads (0: all equal), and `router_confidence`,
the mean of the largest router probability (1/8: uniform).
"""


# %%
def fit(block, seed, jit_compile="auto", epochs=EPOCHS):
    keras.utils.set_random_seed(seed)
    model = build(block)
    steps = epochs * -(-ROWS // 256)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, steps)
    eager = QUICK and jit_compile == "auto"  # tracing a graph does not pay
    model.compile(
        keras.optimizers.Adam(rate), "mse", jit_compile=jit_compile, run_eagerly=eager
    )
    history = model.fit(*train, batch_size=256, epochs=epochs, verbose=0)
    return model, pd.DataFrame(history.history, index=1 + np.arange(epochs))


def predict(model, points):
    return model.predict(points, batch_size=5000, verbose=0)


def test_error(model):
    return float(np.mean((predict(model, test[0]) - test[1]) ** 2))


models, curves, errors = {}, {}, pd.DataFrame(columns=list(BLOCKS))
for seed in range(SEEDS):
    for name, block in BLOCKS.items():
        model, curve = fit(block(), seed)
        errors.loc[f"seed {seed}", name] = test_error(model)
        if seed == 0:
            models[name], curves[name] = model, curve

print("training curves of the mixture, seed 0")
print(curves["MoE"].iloc[[0, EPOCHS // 2, -1]].to_string(float_format="%.3f"))

# %%
errors.loc["mean"] = errors.iloc[:SEEDS].mean()
print("mean squared error on the test rows")
print(errors.astype(float).to_string(float_format="%.4f"))

# %% [markdown]
"""
## Specialization of the experts

The router is a layer: given the features of a point, it returns the experts that the
point is sent to. The rightmost plot shows the first choice for each point of the plane.
The white lines are the true borders, which are not inputs of the model.
"""

# %%
moe = models["MoE"].get_layer("moe")
features = keras.Sequential([keras.Input((2,)), models["MoE"].get_layer("features")])


def first_choice(points):
    routing = moe.router(features(points))
    return np.asarray(routing.expert_indices)[:, 0]


side = np.linspace(-1, 1, 200, dtype="float32")
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
borders = region_of(grid).reshape(200, 200)
panels = {
    "label": label_of(grid),
    "prediction, narrow block": predict(models["narrow"], grid),
    "prediction, MoE": predict(models["MoE"], grid),
    "first-choice expert": first_choice(grid),
}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), dpi=80, layout="constrained")
for ax, (title, values) in zip(axes, panels.items(), strict=True):
    experts = title == "first-choice expert"
    ax.imshow(
        values.reshape(200, 200),
        origin="lower",
        extent=(-1, 1, -1, 1),
        cmap="Dark2" if experts else "RdBu",
        vmin=0 if experts else -2,
        vmax=NUM_EXPERTS - 1 if experts else 2,
    )
    for region in range(6):
        inside = (borders == region).astype(float)
        ax.contour(side, side, inside, [0.5], colors="white", linewidths=1)
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
"""
The same as a table: the fraction of the test points of a region with each expert as
first choice. If the router ignored the regions, all rows would be equal.
"""

# %%
shares = pd.crosstab(
    pd.Series(region_of(test[0]), name="region"),
    pd.Series(first_choice(test[0]), name="expert"),
    normalize="index",
).reindex(columns=range(NUM_EXPERTS), fill_value=0.0)
figure, ax = plt.subplots(figsize=(6, 3), dpi=80, layout="constrained")
image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for (region, expert), share in np.ndenumerate(shares.to_numpy()):
    if share >= 0.005:
        colour = "white" if share > 0.6 else "black"
        ax.text(expert, region, f"{share:.2f}", ha="center", va="center", color=colour)
ax.set(xlabel="expert", ylabel="region", title="fraction of the region's points")
figure.colorbar(image, ax=ax)
plt.show()

largest = shares.max(axis=1)
print("fraction of each region's most frequent expert:")
print(largest.round(2).to_list(), f"mean {largest.mean():.2f}")

# %% [markdown]
"""
## With and without XLA

XLA (`jit_compile=True`) requires static shapes; without it, the layer can split the
rows by expert, with data-dependent shapes. `dispatch="auto"` selects the implementation
for the graph that is being traced. The result is the same: two trainings with one seed,
with and without XLA, differ only by rounding.
"""

# %%
compiled, plain = (
    fit(mixture(), seed=0, jit_compile=jit, epochs=1)[0] for jit in (True, False)
)
with_xla, without_xla = (predict(model, test[0]) for model in (compiled, plain))
print(f"largest prediction: {np.abs(without_xla).max():.3f}")
print(f"largest difference below 0.01: {np.abs(with_xla - without_xla).max() < 0.01}")

# %% [markdown]
"""
## Saving, export and serving

A `.keras` file restores the model in Python (after `import keras_moe`, which registers
the layer). `export` writes a SavedModel for serving, which requires only TensorFlow and
accepts batches of any size. Routing metrics are updated in every call; for export, the
weights are copied to a model without them.
"""

# %%
served = build(mixture())
served.set_weights(models["MoE"].get_weights())
expected = predict(models["MoE"], test[0][:7])

with tempfile.TemporaryDirectory() as folder:
    served.save(Path(folder) / "model.keras")
    loaded = keras.models.load_model(Path(folder) / "model.keras")
    served.export(Path(folder) / "saved_model", verbose=False)
    server = tf.saved_model.load(str(Path(folder) / "saved_model"))

answers = {
    "loaded from model.keras": predict(loaded, test[0][:7]),
    "served by the SavedModel": server.serve(test[0][:7]).numpy(),
}
for name, answer in answers.items():
    print(f"{name}: equal to 5 digits: {np.allclose(answer, expected, atol=1e-5)}")

# %% [markdown]
"""
## Results

- The mixture has about the parameters of the wide block (17152 and 16672) and the cost
  per row of the narrow one (8704 operations, against 8192 and 32768).
- Its mean error over three seeds, 0.0156, equals that of the wide block, 0.0152, within
  the range over seeds (0.0138 to 0.0170); the narrow block has 0.0205.
- The experts specialize: the most frequent expert of a region is the first choice for a
  fraction of 0.76 of its points on average, and for all of them in one region. The
  regions of the experts do not coincide with those of the problem: an expert covers
  parts of several regions, and some experts are never a first choice.
- The loads are not equal (final `load_cv` 0.275). A larger weight of the balancing loss
  equalizes them; the notebook on sparse MoE shows its cost.
- Operations are not time: the speed-up depends on sizes, hardware and dispatch; see the
  table in the README.
"""
