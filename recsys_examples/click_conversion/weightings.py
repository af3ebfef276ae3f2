"""The names of `--loss-weighting`."""

from __future__ import annotations

from typing import Any

from keras_moe.multitask import gradients, weighting
from recsys_examples.errors import InputError

WINDOW = 100  # steps of a window of "dwa" and "decay"
DECAY = 0.95  # of the weights of all tasks but the first, per window

# With arguments for t tasks; the others have none that is required.
_WITH_ARGUMENTS = {
    "decay": lambda t: weighting.DecayingWeighting(
        [1.0] * t, [1.0] + [DECAY] * (t - 1), WINDOW
    ),
    "dwa": lambda t: weighting.DWA(WINDOW),
    "fixed": lambda t: weighting.FixedWeighting([1.0] * t),
}


def names() -> list[str]:
    """Return the names of all loss weightings and combinations of gradients."""
    return sorted({*weighting.KNOWN, *gradients.KNOWN, *_WITH_ARGUMENTS})


def make(name: str | None, tasks: int) -> Any:
    """Return what `MultiTaskModel` takes as `loss_weighting`.

    Args:
        name: one of `names()`, or None for the sum of the losses.
        tasks: number of outputs of the model.

    Raises:
        InputError: if the name is unknown.
    """
    if name is not None and name not in names():
        raise InputError(
            f"--loss-weighting: must be one of {', '.join(names())}; got {name!r}"
        )
    if name in _WITH_ARGUMENTS:
        return _WITH_ARGUMENTS[name](tasks)
    return name
