"""What the page shows of a list and of the experts: numbers as text and bars."""

from __future__ import annotations

from typing import Any, NamedTuple

from recsys_examples.movielens.explain_command import MEANING, stands_for
from recsys_examples.movielens.fusion import SCORE_MEANING
from recsys_examples.movielens.profiles import KINDS, Profile
from recsys_examples.movielens.recommendations import Explained, Movie

MOST_EXPERTS = 6  # of a movie; the JSON has all


class Bar(NamedTuple):
    """A number and its bar, from the middle to the right, or the left if negative.

    Attributes:
        text: the number.
        start: where the bar starts, in percent of the width.
        length: its length, in percent.
        kind: "plus" or "minus".
    """

    text: str
    start: float
    length: float
    kind: str


def bar(value: float, largest: float) -> Bar:
    """Return the bar of a contribution, half the width for `largest`."""
    length = 50 * min(abs(value) / largest, 1.0) if largest > 0 else 0.0
    start = 50 - length if value < 0 else 50
    kind = "minus" if value < 0 else "plus"
    return Bar(f"{value:+.2f}", round(start, 1), round(length, 1), kind)


def movies(found: Explained, profile: Profile) -> list[dict[str, Any]]:
    """Return the rows of a list: a movie, its score, predictions and experts' bars.

    The bars of a task have the same scale in the whole list.
    """
    largest = {
        task: max(
            (abs(c) for movie in found.movies for c in movie.contributions[task]),
            default=0.0,
        )
        for task in profile.tasks
    }
    return [
        {
            "title": movie.title or "(no title)",
            "year": movie.year or "year unknown",
            "genres": movie.genres or "no genres listed",
            "score": f"{movie.score:.2f}",
            "predictions": [f"{movie.scores[task]:.2f}" for task in profile.tasks],
            "experts": [
                (
                    expert,
                    [
                        bar(movie.contributions[task][expert], largest[task])
                        for task in profile.tasks
                    ],
                )
                for expert in _shown(movie, profile)
            ],
        }
        for movie in found.movies
    ]


def experts(profile: Profile, found: Explained | None) -> list[dict[str, Any]]:
    """Return what each expert stands for, and its weight for the user of a list."""
    rows = []
    for expert in range(profile.num_experts):
        lines = [("mean weight", _percents(profile, profile.weights[:, expert]))]
        if found is not None:
            own = [found.gate_weights[task][expert] for task in profile.tasks]
            mean = [found.mean_contributions[task][expert] for task in profile.tasks]
            text = ", ".join(
                f"{task} {value:+.2f}"
                for task, value in zip(profile.tasks, mean, strict=True)
            )
            lines.append(("weight for this list", _percents(profile, own)))
            lines.append(("contribution, mean of all movies", text))
        for kind, name in zip(KINDS, ("genres", "decades", "users"), strict=True):
            lines.append((name, stands_for(profile, kind, expert)))
        rows.append({"number": expert, "lines": lines})
    return rows


def as_json(found: Explained, user: int | None) -> dict[str, Any]:
    """Return a list as the JSON endpoint gives it."""
    return {
        "user": user,
        "meaning": {"score": SCORE_MEANING, "contributions": MEANING},
        "gate_weights": found.gate_weights,
        "mean_contributions": found.mean_contributions,
        "movies": [
            {**movie._asdict(), "genres": movie.genres.split(", ")}
            if movie.genres
            else {**movie._asdict(), "genres": []}
            for movie in found.movies
        ],
    }


def experts_as_json(profile: Profile) -> dict[str, Any]:
    """Return the profile of the experts, with all lifts."""
    lifts = {
        kind: {
            name: [float(v) for v in getattr(profile, kind).values[:, c]]
            for c, name in enumerate(getattr(profile, kind).names)
        }
        for kind in KINDS
    }
    weights = {
        task: [float(w) for w in profile.weights[t]]
        for t, task in enumerate(profile.tasks)
    }
    return {"weights": weights, "lifts": lifts}


def _shown(movie: Movie, profile: Profile) -> list[int]:
    """Return the experts with the largest contributions, by number."""

    def largest(expert: int) -> float:
        return max(abs(values[expert]) for values in movie.contributions.values())

    every = range(profile.num_experts)
    return sorted(sorted(every, key=largest, reverse=True)[:MOST_EXPERTS])


def _percents(profile: Profile, values: Any) -> str:
    return ", ".join(
        f"{task} {value:.0%}" for task, value in zip(profile.tasks, values, strict=True)
    )
