"""Training and evaluation of the pipeline.

The ranker is trained on ratings later than those its first stage was trained on.

    first stage trained on          ranker trained on          used for
    early training ratings      ->  late training ratings      both rankers
    all training ratings        ->  the validation window      tuning, final ranker
    all before the test window  ->                             test, export

Epochs, fusion weights and diversity are tuned on the validation window, with a ranker
trained on the late training ratings only. The final ranker is trained on both. The test
window is used once, for the final pipeline.

Axis letters: b users, n examples, c candidates, i movies of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recsys_examples.movielens.features import Sequences
from recsys_examples.movielens.pipeline import Windows
from recsys_examples.movielens.training import Validation
from recsys_examples.two_stage.first_stage import FirstStage, check_candidates
from recsys_examples.two_stage.fusion import Fusion
from recsys_examples.two_stage.ranked import ValidationTuner, measure
from recsys_examples.two_stage.ranker import Examples, Moments, fit_ranker
from recsys_examples.two_stage.retrieval import fit_retrieval
from recsys_examples.two_stage.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """A trained pipeline and its evaluation on the test window.

    Attributes:
        settings: settings of the pipeline.
        stage: the first stage, trained on all ratings before the test window.
        ranker: the second stage.
        fusion: weights of the score fusion.
        metrics: test metrics by name.
        chosen: settings tuned on validation, with the metrics of all values tried.
        funnel: recall of the candidates by number of candidates.
    """

    settings: Settings
    stage: FirstStage
    ranker: keras.Model
    fusion: Fusion
    metrics: dict[str, float]
    chosen: dict[str, Any]
    funnel: dict[int, float]


@dataclass(frozen=True)
class Stages:
    """The first stage trained on three windows, see the module docstring."""

    early: FirstStage
    trained: FirstStage
    last: FirstStage


def fit_first_stages(
    windows: Windows,
    settings: Settings,
    seed: int = 0,
    announce: Callable[[str], None] = lambda _: None,
    backups: Path | None = None,
) -> Stages:
    """Train the first stage three times; the number of epochs is tuned on validation.

    With a folder `backups`, interrupted trainings go on from what it has in it.

    Raises:
        InputError: if `settings.candidates` is below the length of a list or above the
            number of movies.
    """
    catalogue = windows.catalogue
    check_candidates(settings.candidates, len(catalogue))

    def fitted(name: str, past: Sequences, **kwargs: Any) -> FirstStage:
        backup = None if backups is None else backups / f"retrieval_{name}"
        retrieval = fit_retrieval(
            past, catalogue, settings, seed=seed, backup=backup, **kwargs
        )
        return FirstStage(retrieval, past, catalogue, settings)

    announce("First stage: training window, epochs tuned on validation.")
    validation = Validation(windows.before_test, windows.validation_task)
    trained = fitted("trained", windows.train, validation=validation)
    epochs = trained.retrieval.epochs
    announce(f"{epochs} epochs. Early ratings, then all before the test window.")
    early = fitted("early", cut_late(windows.train, settings.late), epochs=epochs)
    last = fitted("last", windows.before_test, epochs=epochs)
    return Stages(early, trained, last)


def run_second_stage(
    windows: Windows,
    stages: Stages,
    settings: Settings,
    seed: int = 0,
    announce: Callable[[str], None] = lambda _: None,
    backups: Path | None = None,
) -> Outcome:
    """Train the ranker, tune on validation, and evaluate on the test window.

    With a folder `backups`, interrupted trainings go on from what it has in it.
    """

    def backup(name: str) -> Path | None:
        return None if backups is None else backups / f"ranker_{name}"

    announce("Ranker: late training ratings, tuned on validation.")
    examples = examples_of(stages.early, windows.train, settings)
    tuner = ValidationTuner(stages.trained, windows.validation_task)
    _, curves = fit_ranker(
        examples,
        settings,
        seed=seed,
        callbacks=[tuner],
        backup=backup("on_validation"),
    )
    fusion, chosen = tuner.choose(settings)
    announce(f"{tuner.epochs} epochs, {fusion}. Final ranker: also on validation.")
    examples = examples.joined(
        examples_of(stages.trained, windows.before_test, settings)
    )
    ranker, _ = fit_ranker(
        examples, settings, seed=seed, epochs=tuner.epochs, backup=backup("final")
    )
    metrics, funnel = measure(stages.last, ranker, fusion, windows.test_task)
    chosen |= {
        "retrieval_epochs": stages.trained.retrieval.epochs,
        "ranker_epochs": tuner.epochs,
        "fusion": fusion._asdict(),
        "curves": curves,
    }
    return Outcome(settings, stages.last, ranker, fusion, metrics, chosen, funnel)


def cut_late(sequences: Sequences, share: float) -> Sequences:
    """Return the sequences without a share of each user's latest ratings.

    At least one rating is removed for users with two or more.
    """
    lengths = sequences.lengths
    late = np.maximum((lengths * share).astype(int), 1) * (lengths > 1)
    kept = np.arange(len(sequences.movies)) < (sequences.starts[1:] - late).repeat(
        lengths
    )
    return Sequences(
        sequences.user_ids,
        np.concatenate([[0], np.cumsum(lengths - late)]),
        sequences.movies[kept],
        sequences.ratings[kept],
        sequences.timestamps[kept],
    )


def examples_of(stage: FirstStage, until: Sequences, settings: Settings) -> Examples:
    """Return training examples from the ratings that follow those of a first stage.

    Args:
        stage: the first stage.
        until: the ratings it was trained on, followed by those of the window to train
            the ranker on.
        settings: number of next movies per example.
    """
    moments = Moments.between(stage.past, until, settings.block)
    return Examples.of(moments, *stage.candidates(until, moments.users, moments.ends))
