"""What the results of the study depend on."""

from __future__ import annotations

from dataclasses import dataclass

BOTTOM, OMOE, MMOE, PLE = "shared bottom", "OMoE", "MMoE", "PLE"
MODELS = (BOTTOM, OMOE, MMOE, PLE)


@dataclass(frozen=True)
class Recipe:
    """What all pairs of tasks have in common.

    The paper gives the dimension and the noise, N(0, 0.01), which we read as a
    variance. It leaves out c, m, a and b: ours are those of the published code of
    Maziarz et al. 2019 (https://arxiv.org/abs/1910.04915), who make the same data:
    c = 1, m = 10, a_i = i and b_i = (i - 1)^2.

    Attributes:
        dimension: input features d.
        scale: c, the length of the weight vectors.
        sines: m, the number of sines in a label.
        noise: standard deviation of a label's noise.
        train_rows: rows to learn from. The paper has "enough" of them; a quarter of
            ours are too few: the models then learn their noise.
        test_rows: rows that measure the loss.
    """

    dimension: int = 100
    scale: float = 1.0
    sines: int = 10
    noise: float = 0.1
    train_rows: int = 262_144
    test_rows: int = 8192


@dataclass(frozen=True)
class Settings:
    """What a result depends on, besides its model, its correlation and its run.

    The paper names Adam and the grid of learning rates, and neither the steps nor the
    size of a batch.

    Attributes:
        recipe: the tasks.
        steps: batches of a run.
        batch_size: rows of a batch.
        learning_rates: the grid. One alone is taken as it is.
        tuning_runs: runs for each model, correlation and rate of the grid.
        seed: of all that is drawn.
    """

    recipe: Recipe = Recipe()
    steps: int = 5000
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (0.0001, 0.001, 0.01)
    tuning_runs: int = 2
    seed: int = 0
