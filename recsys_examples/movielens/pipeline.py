"""Training and evaluation of a ranker: tune on validation, retrain, test.

The number of epochs and the calibration of the watch scores are tuned on validation.
The final ranker is trained from scratch on all ratings before the test window, as ALS
is. The test window is used once, for the final ranker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recsys_examples.errors import InputError
from recsys_examples.movielens.data import MovieLens
from recsys_examples.movielens.evaluation import (
    Rows,
    calibrate,
    measure,
    predict_rows,
    sample_rows,
)
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.fusion import fused_scorer
from recsys_examples.movielens.model import TASKS, Settings
from recsys_examples.movielens.ranking import RankingTask, rank
from recsys_examples.movielens.split import Split, split_by_time
from recsys_examples.movielens.training import Fit, Validation, fit_ranker


@dataclass(frozen=True)
class Windows:
    """The data of an experiment, by time window.

    Attributes:
        catalogue: all movies.
        train: ratings of the training window.
        before_test: ratings of the training and the validation window.
        validation: ratings of the validation window.
        test: ratings of the test window.
        validation_task: ranking of the validation window, with `train` as history.
        test_task: ranking of the test window, with `before_test` as history.
    """

    catalogue: Catalogue
    train: Sequences
    before_test: Sequences
    validation: Sequences
    test: Sequences
    validation_task: RankingTask
    test_task: RankingTask


def make_windows(data: MovieLens) -> Windows:
    """Split a data set by time within each user.

    Raises:
        InputError: if a later window has no liked movie.
    """
    catalogue = Catalogue.from_movies(data.movies)
    user_ids = np.unique(data.ratings.user_id)
    split: Split = split_by_time(data.ratings)

    def sequences(ratings: pd.DataFrame) -> Sequences:
        return Sequences.from_ratings(ratings, catalogue, user_ids)

    train, before_test = sequences(split.train), sequences(split.before_test)
    windows = Windows(
        catalogue,
        train,
        before_test,
        validation=sequences(split.validation),
        test=sequences(split.test),
        validation_task=RankingTask.from_window(train, split.validation, catalogue),
        test_task=RankingTask.from_window(before_test, split.test, catalogue),
    )
    for name, task in (
        ("validation", windows.validation_task),
        ("test", windows.test_task),
    ):
        if not len(task.users):
            raise InputError(
                f"{data.name}: at least one user must have a movie rated 4 or more in "
                f"the {name} window; got none, and nothing to rank"
            )
    return windows


@dataclass(frozen=True)
class Outcome:
    """A trained ranker and its evaluation on the test window.

    Attributes:
        fit: the final ranker, trained on all ratings before the test window.
        curves: training curves of the fit that tuned the number of epochs.
        rows: the pairs that were predicted.
        predictions: prediction of each pair, per task.
        metrics: test metrics by name.
    """

    fit: Fit
    curves: dict[str, list[float]]
    rows: Rows
    predictions: dict[str, np.ndarray]
    metrics: dict[str, float]


def run_ranker(
    windows: Windows,
    settings: Settings,
    *,
    tasks: tuple[str, ...] = TASKS,
    seed: int = 0,
    jit_compile: bool = False,
    verbose: int = 1,
    backups: Path | None = None,
    experts: Path | None = None,
) -> Outcome:
    """Tune on validation, train on all ratings before the test window, and evaluate.

    With a folder `backups`, an interrupted run goes on from what it has in it. With a
    file `experts`, the mixture of the final model is observed.
    """
    catalogue = windows.catalogue
    selection = fit_ranker(
        windows.train,
        catalogue,
        settings,
        tasks=tasks,
        seed=seed,
        validation=Validation(windows.before_test, windows.validation_task),
        jit_compile=jit_compile,
        verbose=verbose,
        backup=None if backups is None else backups / "on_validation",
    )

    calibration = None
    if "watch" in tasks:
        calibration = calibrate(
            *_predict(selection, windows.train, windows.validation, catalogue),
            selection.ranker.calibration,
        )
    fit = fit_ranker(
        windows.before_test,
        catalogue,
        settings,
        tasks=tasks,
        seed=seed,
        epochs=selection.epochs,
        calibration=calibration,
        jit_compile=jit_compile,
        verbose=verbose,
        backup=None if backups is None else backups / "final",
        experts=experts,
    )
    rows, predictions = _predict(fit, windows.before_test, windows.test, catalogue)
    metrics = measure(rows, predictions)
    if "watch" in tasks:
        scorer = fused_scorer(fit.ranker, windows.before_test, catalogue)
        metrics = {**rank(scorer, windows.test_task), **metrics}
    return Outcome(fit, selection.curves, rows, predictions, metrics)


def _predict(
    fit: Fit, past: Sequences, window: Sequences, catalogue: Catalogue
) -> tuple[Rows, dict[str, np.ndarray]]:
    """Predict the pairs of a window and sampled negatives."""
    # Movies that the user rates after the window count as unseen.
    rated = past.matrix(len(catalogue)) + window.matrix(len(catalogue))
    rows = sample_rows(window, rated, len(catalogue))
    return rows, predict_rows(fit.ranker.pairs, rows, past, catalogue)
