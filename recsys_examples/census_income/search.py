"""The random search: which settings each trial of each model tries.

A trial draws the settings that all models have from its number alone, so that all
models try the same ones, and what only one model has from its name as well.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from recsys_examples.census_income.models import Settings, kind_of

# Narrower than the 2048 units that are allowed: wider bodies and longer embeddings were
# no better on validation, and cost more.
TOTAL_UNITS = (256, 512)  # of all experts of a level
DEPTHS = (1, 2)
EMBEDDINGS = (4, 8)
TOWERS = (0, 32)
DROPOUTS = (0.0, 0.1, 0.2, 0.3)
LEARNING_RATES = (1e-3, 6e-3)  # drawn between them, on a log scale
EPOCHS = (4, 6, 8)
AUXILIARY_WEIGHTS = (0.1, 0.3, 1.0)


def draw(model: str, trial: int, seed: int = 0) -> Settings:
    """Return the settings of one trial, always the same for the same arguments.

    Args:
        model: one of `names.CHOICES`, or `names.EQUAL_BOTTOM`.
        trial: its number, from 0.
        seed: of the whole search.
    """
    common = np.random.default_rng([seed, trial])
    own = np.random.default_rng([seed, trial, zlib.crc32(model.encode())])
    kind = kind_of(model)
    structure = _choice(own, kind.structures)
    return Settings(
        embedding=_choice(common, EMBEDDINGS),
        units=_choice(common, TOTAL_UNITS) // kind.experts(**structure),
        depth=_choice(common, DEPTHS),
        tower=_choice(common, TOWERS),
        dropout=_choice(common, DROPOUTS),
        structure=dict(structure),
        learning_rate=_between(common, *LEARNING_RATES),
        epochs=_choice(common, EPOCHS),
        auxiliary_weight=_choice(common, AUXILIARY_WEIGHTS),
    )


def _choice(rng: np.random.Generator, options: Any) -> Any:
    return options[rng.integers(len(options))]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    # Four digits, so that what is written is what was run.
    return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.4g}")
