"""Fusion of the scores of several tasks to one ranking score."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import Ranker
from recsys_examples.movielens.ranking import Scorer

SCORE_MEANING = (
    "The list is sorted by score = ln p(watch) + ln p(like), where p(watch) is before "
    "calibration: the probability among all unseen movies, not against 4 random ones."
)


def fused_scorer(ranker: Ranker, sequences: Sequences, catalogue: Catalogue) -> Scorer:
    """Return a scorer of the catalogue by fused scores, see `fuse`."""

    def score(users: np.ndarray) -> np.ndarray:
        features = sequences.histories(catalogue, users)
        scores = ranker.catalogue.predict(features, batch_size=256, verbose=0)
        return ops.convert_to_numpy(fuse(scores))

    return score


def fuse(scores: dict[str, Any]) -> Any:
    """Return the sum of the log sigmoids of the watch and like scores.

    A task that the model does not have is omitted. The watch score is the uncalibrated
    one, the log odds among all unseen movies. The calibrated probability, against a few
    unseen movies, is near 1 for all movies of a list: like alone would rank them.
    """
    parts = [ops.log_sigmoid(scores[t]) for t in ("watch", "like") if t in scores]
    return sum(parts[1:], parts[0])
