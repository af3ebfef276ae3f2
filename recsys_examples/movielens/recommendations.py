"""Recommendations with the experts behind each movie, from a SavedModel alone.

Axis letters: t tasks, e experts, k length of a list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import HISTORY_LENGTH
from recsys_examples.movielens.loading import load_signatures
from recsys_examples.movielens.profiles import KINDS, Lifts, Profile

TICKED_STARS = 5.0  # what a newcomer's choice counts as

NO_EXPERTS = (
    "{folder} has no experts to explain: it was trained with --body shared_bottom; "
    "train with --body mmoe or moe"
)
_TOO_OLD = "{folder} has no signature {name!r}: it is of an older version; train again"


class Choice(NamedTuple):
    """A movie that a newcomer can choose.

    Attributes:
        movie_id: the id.
        title: the title, "" if it has none.
        year: the year of release, 0 if unknown.
    """

    movie_id: int
    title: str
    year: int


class Movie(NamedTuple):
    """A movie of a list.

    Attributes:
        movie_id: the id.
        title: the title, "" if it has none.
        year: the year of release, 0 if unknown.
        genres: the genres, separated by ", ".
        score: the fused score, by which the list is sorted; see `fusion.fuse`.
        scores: the prediction of each task: probabilities, or stars.
        contributions: for each task, what each expert contributes to the prediction;
            see `experts`.
    """

    movie_id: int
    title: str
    year: int
    genres: str
    score: float
    scores: dict[str, float]
    contributions: dict[str, list[float]]


class Explained(NamedTuple):
    """A list of movies and the experts behind it.

    Attributes:
        known: whether the user is known to the model.
        gate_weights: for each task, the weight of each expert for this user.
        mean_contributions: for each task, the mean contribution of each expert over
            the catalogue.
        movies: the list, best first; shorter than k if fewer are unseen.
        unknown_movies: ids of a newcomer's movies that are not in the catalogue.
    """

    known: bool
    gate_weights: dict[str, list[float]]
    mean_contributions: dict[str, list[float]]
    movies: list[Movie]
    unknown_movies: tuple[int, ...] = ()


class ExplainedModel:
    """The SavedModel of a run, which explains its recommendations.

    Args:
        run: the folder of a run, or of a SavedModel.

    Attributes:
        profile: what each expert stands for.
        popular: the most rated movies.
        num_movies: the size of the catalogue.

    Raises:
        InputError: if there is no such SavedModel, it is damaged, was written by an
            older version, or has no experts.
    """

    def __init__(self, run: Path) -> None:
        folder, signatures = load_signatures(run)
        for name in ("experts", "movies"):
            if name not in signatures:
                raise InputError(_TOO_OLD.format(folder=folder, name=name))
        self.profile = _profile(signatures["experts"]())
        if not self.profile.num_experts:
            raise InputError(NO_EXPERTS.format(folder=folder))
        movies = {k: v.numpy() for k, v in signatures["movies"]().items()}
        self.num_movies = int(movies["num_movies"])
        self.popular = [
            Choice(int(movie), title.decode(), int(year))
            for movie, title, year in zip(
                movies["movie_id"], movies["title"], movies["year"], strict=True
            )
        ]
        self._explain = signatures["explain"]
        self._explain_history = signatures["explain_history"]

    def for_user(self, user_id: int, k: int) -> Explained:
        """Return the list of a user, at most k movies.

        Raises:
            ValueError: if `k` is not from 1 to the size of the catalogue.
        """
        user = tf.constant([user_id], tf.int64)
        arrays = _call(self._explain, user_id=user, k=tf.constant(k))
        return self._explained(arrays)

    def for_newcomer(self, movie_ids: Sequence[int], k: int) -> Explained:
        """Return the list of a newcomer who likes some movies, the latest first.

        Raises:
            ValueError: if `k` is not from 1 to the size of the catalogue, or there are
                more movies than a history has.
        """
        if len(movie_ids) > HISTORY_LENGTH:
            raise ValueError(
                f"at most {HISTORY_LENGTH} movies can be chosen; got {len(movie_ids)}"
            )
        history = np.zeros((1, HISTORY_LENGTH), "int64")
        history[0, : len(movie_ids)] = movie_ids
        stars = np.where(history != 0, TICKED_STARS, 0.0).astype("float32")
        arrays = _call(
            self._explain_history,
            history=tf.constant(history),
            history_ratings=tf.constant(stars),
            k=tf.constant(k),
        )
        given = arrays["known_movie"][: len(movie_ids)]
        unknown = (m for m, known in zip(movie_ids, given, strict=True) if not known)
        return self._explained(arrays)._replace(unknown_movies=tuple(unknown))

    def _explained(self, found: dict[str, np.ndarray]) -> Explained:
        tasks = self.profile.tasks

        def by_task(values: np.ndarray) -> dict[str, list[float]]:
            return {task: values[t].tolist() for t, task in enumerate(tasks)}

        movies = [
            Movie(
                int(found["movie_id"][j]),
                found["title"][j].decode(),
                int(found["year"][j]),
                found["genres"][j].decode(),
                float(found["score"][j]),
                {task: float(found[task][j]) for task in tasks},
                by_task(found["contributions"][j]),
            )
            for j in np.flatnonzero(found["movie_id"])
        ]
        return Explained(
            bool(found["known_user"]),
            by_task(found["gate_weights"]),
            by_task(found["mean_contributions"]),
            movies,
        )


def _call(signature: Any, **inputs: Any) -> dict[str, np.ndarray]:
    """Return the outputs of a signature for one user.

    Raises:
        ValueError: if the signature refuses `k`.
    """
    try:
        return {name: value.numpy()[0] for name, value in signature(**inputs).items()}
    except tf.errors.InvalidArgumentError as error:
        reason = re.search(r"\bk`? (must [^.:\]]*)", error.message)
        raise ValueError(f"k {reason[1]}" if reason else error.message) from error


def _profile(answer: dict[str, Any]) -> Profile:
    """Return the profile that the signature `experts` has."""
    arrays = {name: value.numpy() for name, value in answer.items()}

    def names(key: str) -> tuple[str, ...]:
        return tuple(name.decode() for name in arrays[key])

    kinds = {kind: Lifts(names(kind), arrays[f"{kind}_lifts"]) for kind in KINDS}
    return Profile(names("tasks"), arrays["weights"], **kinds)
