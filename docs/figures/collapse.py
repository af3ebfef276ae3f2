"""Draw `collapse.png`: a router that collapses, and the same with a balancing loss.

    python docs/figures/collapse.py

Tokens of 16 kinds, of which the most frequent is 30% of all, go to one of 8 experts.
"""

from pathlib import Path
from typing import Any

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_moe import plots
from keras_moe.callbacks import ExpertMonitor
from keras_moe.layers import MoE

KINDS, FEATURES, ROWS, EPOCHS = 16, 16, 16_384, 12


def tokens(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (ROWS, FEATURES) and labels (ROWS, 1): a wave for each kind."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(KINDS, FEATURES))
    directions = rng.normal(size=(KINDS, FEATURES)) / 4
    levels = rng.normal(size=KINDS)
    share = 1 / np.arange(1, KINDS + 1)
    kind = rng.choice(KINDS, ROWS, p=share / share.sum())
    offset = 0.5 * rng.normal(size=(ROWS, FEATURES))
    label = levels[kind] + np.sin(2 * np.sum(offset * directions[kind], axis=1))
    return (centres[kind] + offset).astype("float32"), label[:, None].astype("float32")


def observations(balance: float) -> list[dict[str, Any]]:
    """Train a model whose balancing loss has this weight; return what was seen."""
    keras.utils.set_random_seed(0)
    x, y = tokens(0)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(32, activation="relu")(inputs)
    moe = MoE(8, (32, 32), top_k=1, load_balancing_loss_weight=balance, name="moe")
    hidden = keras.layers.Activation("relu")(moe(hidden))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(0.003), "mse")
    monitor = ExpertMonitor(x[:2048], every_steps=16)
    model.fit(x, y, batch_size=256, epochs=EPOCHS, callbacks=[monitor], verbose=0)
    return monitor.observations


def main() -> None:
    """Write the picture beside this file."""
    figure, both = plt.subplots(
        1, 2, figsize=(9, 3.4), sharey=True, layout="constrained"
    )
    for ax, balance, title in zip(
        both,
        (0.0, 0.1),
        ("no balancing loss: collapse", "load_balancing_loss_weight=0.1"),
        strict=True,
    ):
        seen = observations(balance)
        plots.load_over_time(seen, "moe", ax)
        ax.set_title(title)
        print(title, seen[-1]["mixtures"]["moe"]["load"].round(2))
    both[0].get_legend().remove()
    both[1].set_ylabel("")
    figure.savefig(Path(__file__).parent / "collapse.png", dpi=110)


if __name__ == "__main__":
    main()
