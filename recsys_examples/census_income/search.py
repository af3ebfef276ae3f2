"""The random search: the settings of each trial of each model.

Settings common to all models depend only on the trial number, hence all models try the
same values. Settings specific to a model also depend on its name.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from recsys_examples.census_income.models import Settings, kind_of

# Below the limit of 2048 units: wider bodies and larger embeddings were no better on
# validation, and slower.
TOTAL_UNITS = (256, 512)  # total over the experts of a level
DEPTHS = (1, 2)
EMBEDDINGS = (4, 8)
TOWERS = (0, 32)
DROPOUTS = (0.0, 0.1, 0.2, 0.3)
LEARNING_RATES = (1e-3, 6e-3)  # log-uniform between them
EPOCHS = (4, 6, 8)
AUXILIARY_WEIGHTS = (0.1, 0.3, 1.0)


def draw(model: str, trial: int, seed: int = 0) -> Settings:
    """Return the settings of one trial, a deterministic function of the arguments.

    Args:
        model: one of `names.CHOICES`, or `names.EQUAL_BOTTOM`.
        trial: number of the trial, from 0.
        seed: seed of the search.
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
        learning_rate=_log_uniform(common, *LEARNING_RATES),
        epochs=_choice(common, EPOCHS),
        auxiliary_weight=_choice(common, AUXILIARY_WEIGHTS),
    )


def _choice(rng: np.random.Generator, options: Any) -> Any:
    return options[rng.integers(len(options))]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # Rounded to four digits: the value in the results file is the value used.
    return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.4g}")
