"""The settings of the study."""

from __future__ import annotations

from dataclasses import dataclass

BOTTOM, OMOE, MMOE, PLE = "shared bottom", "OMoE", "MMoE", "PLE"
MODELS = (BOTTOM, OMOE, MMOE, PLE)


@dataclass(frozen=True)
class Recipe:
    """Settings of the synthetic data.

    The paper gives the dimension and the noise, N(0, 0.01), which we interpret as a
    variance. It does not give c, m, a and b: we use those of the published code of
    Maziarz et al. 2019 (https://arxiv.org/abs/1910.04915), who generate the same data:
    c = 1, m = 10, a_i = i and b_i = (i - 1)^2.

    Attributes:
        dimension: number of input features d.
        scale: norm c of the weight vectors.
        sines: number m of sine terms in a label.
        noise: standard deviation of the label noise.
        train_rows: number of training rows. The paper says "enough"; with a quarter of
            ours the models overfit.
        test_rows: number of test rows.
    """

    dimension: int = 100
    scale: float = 1.0
    sines: int = 10
    noise: float = 0.1
    train_rows: int = 262_144
    test_rows: int = 8192


@dataclass(frozen=True)
class Settings:
    """Settings of all runs.

    The paper names Adam and the grid of learning rates, but not the number of steps or
    the batch size.

    Attributes:
        recipe: settings of the data.
        steps: training steps per run.
        batch_size: rows per batch.
        learning_rates: grid of learning rates. A single value is not tuned.
        tuning_runs: tuning runs per model, correlation and learning rate.
        seed: seed of the data and weights of all runs.
    """

    recipe: Recipe = Recipe()
    steps: int = 5000
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (0.0001, 0.001, 0.01)
    tuning_runs: int = 2
    seed: int = 0
