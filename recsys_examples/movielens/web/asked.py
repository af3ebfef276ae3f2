"""What a request asks for, and the errors of one that cannot be answered."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import QueryParams

from recsys_examples.movielens.recommendations import Explained, ExplainedModel

DEFAULT_MOVIES, MOST_MOVIES = 10, 50  # of a list
MOST_TICKED = 20  # of a newcomer
_HIGHEST_ID = 2**63 - 1
_NUMBER = re.compile(r"-?\d{1,20}(\.\d{1,20})?", re.ASCII)

MovieId = Annotated[int, Field(ge=1, le=_HIGHEST_ID)]


class Asked(BaseModel):
    """The parameters of a request.

    Attributes:
        user: the id of a user.
        newcomer: whether the list is for a newcomer, who may like movies.
        movie: ids of movies that a newcomer likes, the latest first.
        k: the length of the list.
    """

    model_config = ConfigDict(extra="forbid")

    user: Annotated[int | None, Field(ge=0, le=_HIGHEST_ID)] = None
    newcomer: bool = False
    movie: Annotated[list[MovieId], Field(max_length=MOST_TICKED)] = []
    k: Annotated[int, Field(ge=1, le=MOST_MOVIES)] = DEFAULT_MOVIES

    @property
    def is_empty(self) -> bool:
        """Whether it asks for no list."""
        return self.user is None and not self.newcomer and not self.movie


class Form(NamedTuple):
    """What the form shows: what was asked for, also if that cannot be answered.

    Attributes:
        user: the user id, "" if none or no number: a field of numbers has no other.
        movies: ids of the movies that are ticked, also if there are too many.
        k: the length of the list, "" if none or no number.
    """

    user: str
    movies: frozenset[int]
    k: str

    @classmethod
    def of(cls, parameters: QueryParams) -> Form:
        """Return the form of a request, whether or not it is valid."""
        movies = filter(_NUMBER.fullmatch, parameters.getlist("movie"))
        return cls(
            _number(parameters.get("user", "")),
            frozenset(int(movie) for movie in movies if "." not in movie),
            _number(parameters.get("k", "")),
        )


def _number(text: str) -> str:
    return text if _NUMBER.fullmatch(text) else ""


class ProblemError(Exception):
    """A request that cannot be answered.

    Args:
        status: the HTTP status.
        text: one line that names the parameter and the rule.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def check_given_once(request: Request) -> None:
    """Check that no parameter but `movie` has several values.

    Raises:
        ProblemError: 422 if one has; the last value would be taken.
    """
    for name in Asked.model_fields:
        count = len(request.query_params.getlist(name))
        if name != "movie" and count > 1:
            raise ProblemError(422, f"`{name}` must be given once; got {count} values")


def answer(model: ExplainedModel, asked: Asked) -> Explained:
    """Return the list that is asked for.

    Raises:
        ProblemError: 400 if it is unclear whose list; 404 for an unknown user or movie;
            422 if `k` exceeds the catalogue.
    """
    if asked.is_empty:
        raise ProblemError(
            400, "give `user` (an id), or `newcomer=1` and liked movies as `movie`"
        )
    if asked.user is not None and (asked.newcomer or asked.movie):
        raise ProblemError(400, "give `user`, or `newcomer` and `movie`, not both")
    if asked.k > model.num_movies:
        raise ProblemError(
            422,
            f"`k` must be at most {model.num_movies}, the size of the catalogue; "
            f"got {asked.k}",
        )
    if asked.user is not None:
        found = model.for_user(asked.user, asked.k)
        if not found.known:
            raise ProblemError(404, f"`user` {asked.user} is not known to the model")
        return found
    found = model.for_newcomer([*dict.fromkeys(asked.movie)], asked.k)
    if found.unknown_movies:
        raise ProblemError(
            404, f"`movie` {found.unknown_movies[0]} is not in the catalogue"
        )
    return found
