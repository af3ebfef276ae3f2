"""From ratings to a measured ranker: select on validation, fit again, test.

The test window is read once, by the ranker that is kept. What is chosen (the number of
epochs, and the line that makes a probability of a watch score) is chosen on validation;
then the ranker is trained anew on everything before the test window, as ALS is.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """The data of an experiment, with the windows of time kept apart.

    Attributes:
        catalogue: all movies.
        train: every user's ratings of the training window.
        before_test: those of the training and the validation window.
        validation: those of the validation window.
        test: those of the test window.
        validation_task: the validation window's ranking, with `train` as the past.
        test_task: the test window's ranking, with `before_test` as the past.
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
        InputError: if a window holds no liked movie to rank.
    """
    catalogue = Catalogue.from_movies(data.movies)
    user_ids = np.unique(data.ratings.user_id)
    split: Split = split_by_time(data.ratings)

    def laid_out(ratings: pd.DataFrame) -> Sequences:
        return Sequences.from_ratings(ratings, catalogue, user_ids)

    train, before_test = laid_out(split.train), laid_out(split.before_test)
    windows = Windows(
        catalogue,
        train,
        before_test,
        validation=laid_out(split.validation),
        test=laid_out(split.test),
        validation_task=RankingTask.from_window(train, split.validation, catalogue),
        test_task=RankingTask.from_window(before_test, split.test, catalogue),
    )
    for name, task in (
        ("validation", windows.validation_task),
        ("test", windows.test_task),
    ):
        if not len(task.users):
            raise InputError(
                f"{data.name}: no user has a movie rated 4 or more in the {name} "
                "window, so there is nothing to rank"
            )
    return windows


@dataclass(frozen=True)
class Outcome:
    """A trained ranker, and what it is worth on the test window.

    Attributes:
        fit: the ranker that was kept, trained on all before the test window.
        curves: the curves of the fit that selected the number of epochs.
        rows: the pairs that were predicted.
        predictions: per task, the prediction of each pair.
        metrics: by name.
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
) -> Outcome:
    """Select on validation, train on all before the test window, and measure."""
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
    )

    def predicted(
        fit: Fit, past: Sequences, window: Sequences
    ) -> tuple[Rows, dict[str, np.ndarray]]:
        # What the user rated later is unknown here, so it counts as unseen.
        rated = past.matrix(len(catalogue)) + window.matrix(len(catalogue))
        rows = sample_rows(window, rated, len(catalogue))
        return rows, predict_rows(fit.ranker.pairs, rows, past, catalogue)

    calibration = None
    if "watch" in tasks:
        calibration = calibrate(
            *predicted(selection, windows.train, windows.validation),
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
    )
    rows, predictions = predicted(fit, windows.before_test, windows.test)
    metrics = measure(rows, predictions)
    if "watch" in tasks:
        scorer = fused_scorer(fit.ranker, windows.before_test, catalogue)
        metrics = {**rank(scorer, windows.test_task), **metrics}
    return Outcome(fit, selection.curves, rows, predictions, metrics)
