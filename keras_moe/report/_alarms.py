"""The signs of collapse of all observations: each once, with its epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from keras_moe.telemetry import Sign, signs_of_collapse
from keras_moe.telemetry._collapse import LEAST_ROWS, rows_for_all_signs


class When(NamedTuple):
    """When an observation was made: the training in the file, and the epoch, from 1."""

    training: int
    epoch: int


class AlarmOnPage(NamedTuple):
    """An alarm as the page shows it: a sign, with where it was seen.

    Attributes:
        text: str, the sign of the last observation that has it, and its epochs.
        is_last: bool, whether the last observation has it.
    """

    text: str
    is_last: bool


def alarms(observations: list[dict[str, Any]]) -> list[AlarmOnPage]:
    """Return the signs of all observations, those of the last one first."""
    times = _times(observations)
    seen: dict[tuple[str, ...], list[tuple[int, Sign]]] = {}
    for i, observation in enumerate(observations):
        for sign in _signs(observation):
            seen.setdefault(_subject(sign), []).append((i, sign))
    last = len(observations) - 1
    found = [
        AlarmOnPage(
            _text([sign for _, sign in those], [times[i] for i, _ in those], times),
            those[-1][0] == last,
        )
        for those in seen.values()
    ]
    return sorted(found, key=lambda alarm: not alarm.is_last)


def too_small(observation: dict[str, Any]) -> list[str]:
    """Return a line for each mixture whose sample does not show all signs."""
    lines = []
    for name, figures in observation["mixtures"].items():
        rows, needed = figures["rows"], rows_for_all_signs(figures)
        hidden = "do not show dead experts"
        if rows < LEAST_ROWS:
            needed, hidden = LEAST_ROWS, "show no sign"
        if rows < needed:
            lines.append(
                f"{name}: the sample has {rows} rows; fewer than {needed} {hidden}."
            )
    return lines


def _signs(observation: dict[str, Any]) -> Iterator[Sign]:
    for name, figures in observation["mixtures"].items():
        yield from signs_of_collapse(
            name, figures["gates"], figures, figures.get("top_k")
        )


def _subject(sign: Sign) -> tuple[str, ...]:
    """Return what the signs of two observations have in common if they are the same.

    Figures differ between observations, and dead experts come and go.
    """
    return sign.kind, sign.mixture, sign.gate


def _text(those: list[Sign], with_sign: list[When], times: list[When]) -> str:
    latest = those[-1]
    text = f"{latest.kind}, {_epochs(with_sign, times)}: {latest.text}"
    earlier = {k for sign in those for k in sign.experts} - {*latest.experts}
    if not earlier:
        return text
    named = "expert" if len(earlier) == 1 else "experts"
    return f"{text}. Earlier also {named} {', '.join(map(str, sorted(earlier)))}"


def _times(observations: list[dict[str, Any]]) -> list[When]:
    """Return when each was made. A file may have those of several trainings."""
    times: list[When] = []
    training, before = 0, (math.inf, 0)
    for observation in observations:
        # In a training both grow; a further `fit` starts again from epoch 0, and one
        # of another model from step 0.
        epoch, step = observation["epoch"], observation["step"]
        if epoch < before[0] or (epoch == before[0] and step <= before[1]):
            training += 1
        before = (epoch, step)
        times.append(When(training, epoch + 1))
    return times


def _epochs(with_sign: list[When], times: list[When]) -> str:
    """Return such as "epochs 2 to 4", "epoch 2 only" or "epochs 1, 3 to 5"."""
    parts = []
    trainings = times[-1].training
    for training in sorted({when.training for when in with_sign}):
        observed = sorted({when.epoch for when in times if when.training == training})
        found = {when.epoch for when in with_sign if when.training == training}
        text = ", ".join(_runs(observed, found))
        single = "epoch {} only" if len(observed) > 1 else "epoch {}"
        text = (single if len(found) == 1 else "epochs {}").format(text)
        prefix = f"training {training} of {trainings}, " if trainings > 1 else ""
        parts.append(prefix + text)
    return "; ".join(parts)


def _runs(observed: list[int], found: set[int]) -> Iterator[str]:
    """Yield the epochs that follow each other in `observed`, as "2" or "2 to 4"."""
    for is_found, run in groupby(observed, key=found.__contains__):
        epochs = list(run)
        if is_found:
            first, last = epochs[0], epochs[-1]
            yield str(first) if first == last else f"{first} to {last}"
