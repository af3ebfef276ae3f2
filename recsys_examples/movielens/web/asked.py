"""What a request asks for, and the errors of one that cannot be answered."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from recsys_examples.movielens.recommendations import Explained, ExplainedModel

MOST_MOVIES = 50  # of a list
MOST_TICKED = 20  # of a newcomer
_HIGHEST_ID = 2**63 - 1

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
    k: Annotated[int, Field(ge=1, le=MOST_MOVIES)] = 10

    @property
    def is_empty(self) -> bool:
        """Whether it asks for no list."""
        return self.user is None and not self.newcomer and not self.movie


class ProblemError(Exception):
    """A request that cannot be answered.

    Args:
        status: the HTTP status.
        text: one line that names the parameter and the rule.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


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
