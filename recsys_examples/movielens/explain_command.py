"""`recommend --explain`: the experts behind each movie, printed."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from recsys_examples.command import make_console
from recsys_examples.errors import InputError
from recsys_examples.movielens.fusion import SCORE_MEANING
from recsys_examples.movielens.profiles import KINDS, Profile
from recsys_examples.movielens.recommendations import Explained, ExplainedModel

MEANING = (
    "An expert's contribution to a task: how far its prediction (log odds of watch "
    "before calibration, log odds of like, stars of rating) would fall without the "
    "expert, its gate weight 0 and the others of the gate renormalized."
)


def recommend_explained(options: argparse.Namespace) -> None:
    """Print a user's list with the experts behind each movie."""
    model = ExplainedModel(options.model)
    try:
        found = model.for_user(options.user, options.k)
    except ValueError as error:
        raise InputError(f"--k {options.k}: {error}") from error
    console = make_console()
    print_explained(console, options.user, found, model.profile)
    print_profile(console, model.profile)


def print_explained(
    console: Console, user: int, found: Explained, profile: Profile
) -> None:
    """Print a list: scores, and what each expert contributes to the tasks."""
    title = f"For user {user}"
    if not found.known:
        title = f"For unknown user {user}: the list of a new user"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("movie")
    table.add_column("score", justify="right")
    for task in profile.tasks:
        table.add_column(task, justify="right")
        table.add_column(f"experts of {task}", justify="left")
    for movie in found.movies:
        name = f"{movie.title or '(no title)'} ({movie.year or '?'})"
        row = [name, f"{movie.score:.2f}"]
        for task in profile.tasks:
            row += [f"{movie.scores[task]:.2f}", _signed(movie.contributions[task])]
        table.add_row(*row)
    table.add_section()
    row = ["mean of all movies", ""]
    for task in profile.tasks:
        row += ["", _signed(found.mean_contributions[task])]
    table.add_row(*row)
    row = ["gate weights of this user", ""]
    for task in profile.tasks:
        row += ["", "  ".join(f"{w:5.0%}" for w in found.gate_weights[task])]
    table.add_row(*row)
    experts = "  ".join(f"{e:>5}" for e in range(profile.num_experts))
    for column in table.columns[3::2]:
        column.header = f"{column.header}\n{experts}"
    console.print(table)
    console.print(SCORE_MEANING)
    console.print(MEANING)


def print_profile(console: Console, profile: Profile) -> None:
    """Print what each expert stands for."""
    table = Table(
        title="What the experts stand for: how much more their users, by gate weight, "
        "have of something than the average user",
        title_justify="left",
    )
    table.add_column("expert", justify="right")
    for task in profile.tasks:
        table.add_column(f"weight,\n{task}", justify="right")
    for heading in ("genres", "decades", "users"):
        table.add_column(heading)
    for expert in range(profile.num_experts):
        table.add_row(
            str(expert),
            *(f"{weight:.0%}" for weight in profile.weights[:, expert]),
            *(stands_for(profile, kind, expert) for kind in KINDS),
        )
    console.print(table)


def stands_for(profile: Profile, kind: str, expert: int) -> str:
    """Return what stands out of a kind, such as "Film-Noir +31%, Horror +11%"."""
    top = getattr(profile, kind).top(expert)
    return ", ".join(f"{name} {lift - 1:+.0%}" for name, lift in top) or "as average"


def _signed(values: list[float]) -> str:
    return "  ".join(f"{value:+5.2f}" for value in values)
