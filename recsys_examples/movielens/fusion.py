"""One score of several tasks, by which movies are ranked."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import Ranker
from recsys_examples.movielens.ranking import Scorer


def fused_scorer(ranker: Ranker, sequences: Sequences, catalogue: Catalogue) -> Scorer:
    """Rank by the fused scores, see `fuse`."""

    def score(users: np.ndarray) -> np.ndarray:
        features = sequences.histories(catalogue, users)
        scores = ranker.catalogue.predict(features, batch_size=256, verbose=0)
        return ops.convert_to_numpy(fuse(scores))

    return score


def fuse(scores: dict[str, Any]) -> Any:
    """Add log sigmoids of watch and like, as far as the model has these tasks.

    The watch score is the log odds among all unseen movies, as it was learned, and not
    the calibrated one behind the probability that is shown: at odds of one to some
    unseen movies nearly every movie of a list is certain, and like would decide alone.
    """
    parts = [ops.log_sigmoid(scores[t]) for t in ("watch", "like") if t in scores]
    return sum(parts[1:], parts[0])
