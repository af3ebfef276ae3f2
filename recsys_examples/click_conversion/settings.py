"""The models that are compared, and the budget that each of them has."""

from __future__ import annotations

from dataclasses import dataclass

SINGLE, BOTTOM, MMOE, PLE = "single task", "SharedBottom", "MMoE", "PLE"
ESMM, IPW, DR, AITM = "ESMM", "ESCM2-IPW", "ESCM2-DR", "AITM"
# Conversions from clicked rows alone; the others use all rows.
NAIVE = (SINGLE, BOTTOM, MMOE, PLE)
ENTIRE_SPACE = (ESMM, IPW, DR, AITM)
MODELS = (*NAIVE, *ENTIRE_SPACE)
MIXTURES = (MMOE, PLE)
# What the map varies, in the order of `regimes.FACTORS`.
MAP_FACTORS = ("conflict", "scarcity", "imbalance", "scenarios", "size", "rows")


@dataclass(frozen=True)
class Budget:
    """What each model may spend, the same for all.

    The learning rate and the number of epochs are chosen by the mean validation loss
    over tuning runs, which have other seeds than the runs of the results.

    Attributes:
        learning_rates: grid of learning rates of Adam.
        epochs: grid of numbers of epochs, rising.
        tuning_seeds: tuning runs of each learning rate.
        seeds: runs of the results.
        batch_size: rows of a training step.
        first_seed: seed of the first run. The simulator's settings were chosen on seeds
            below 100.
    """

    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    epochs: tuple[int, ...] = (2, 5, 15)
    tuning_seeds: int = 2
    seeds: int = 10
    batch_size: int = 512
    first_seed: int = 100
