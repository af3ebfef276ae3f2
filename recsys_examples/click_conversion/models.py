"""The models, with about equal numbers of parameters.

Axis letters: n rows, f numbers, c categories.

Every model has a table for each category, whose rows are concatenated with the numbers,
a body (separate layers per task, a shared bottom, MMoE or PLE), and a tower per task.
Over a chain, AITM has its own towers; the others differ in how the towers' logits
become probabilities and losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_moe import layers, multitask
from recsys_examples.click_conversion import weightings
from recsys_examples.click_conversion.problems import Chain, Problem
from recsys_examples.click_conversion.settings import (
    AITM,
    BOTTOM,
    DR,
    ESMM,
    IPW,
    MMOE,
    MODELS,
    PLE,
    SINGLE,
)
from recsys_examples.widths import nearest_width

MAX_DIMENSIONS = 8  # of the tables


class Columns(NamedTuple):
    """The inputs of a model.

    Attributes:
        numbers: names of the columns of numbers.
        vocabulary: pairs (name, number of indices) of the categories.
    """

    numbers: tuple[str, ...]
    vocabulary: tuple[tuple[str, int], ...]


class Shape(NamedTuple):
    """The size of a model.

    Attributes:
        width: units of each expert of the body, or of the bottom.
        towers: widths of the hidden layers of each tower.
        activation: of the body; the towers' hidden layers have ReLU.
    """

    width: int
    towers: tuple[int, ...] = ()
    activation: str = "relu"


Body = Callable[..., Any]

BODIES: dict[str, Body] = {
    BOTTOM: layers.SharedBottom,
    MMOE: partial(layers.MMoE, 4),
    PLE: partial(layers.PLE, 1, 2, 1),  # one level, 2 shared experts, 1 per task
}


def build_model(
    problem: Problem,
    model: str,
    columns: Columns,
    shape: Shape,
    loss_weighting: str | None = None,
) -> multitask.MultiTaskModel:
    """Return a model that is not compiled.

    Args:
        problem: the tasks.
        model: one of `problem.models`.
        columns: the inputs.
        shape: the size.
        loss_weighting: name of a loss weighting or of a combination of gradients; None
            for the sum of the losses.

    Returns:
        A model of `{"numbers": (n, f), "codes": (n, c)}`, without the key of a kind of
        which there is no column.
    """
    inputs: dict[str, Any] = {}
    if columns.numbers:
        inputs["numbers"] = keras.Input((len(columns.numbers),), name="numbers")
    if columns.vocabulary:
        inputs["codes"] = keras.Input(
            (len(columns.vocabulary),), dtype="int32", name="codes"
        )
    if isinstance(problem, Chain):
        outputs, tasks = _chain(problem, model, inputs, columns, shape)
    else:
        tasks = [goal.task() for goal in problem.goals]
        shared = _body(model, [t.name for t in tasks], inputs, columns, shape)
        outputs = {t.name: t.tower(shape.towers)(shared[t.name]) for t in tasks}
    return multitask.MultiTaskModel(
        inputs,
        outputs,
        tasks=tasks,
        loss_weighting=weightings.make(loss_weighting, len(outputs)),
    )


def _chain(
    problem: Chain, model: str, inputs: dict[str, Any], columns: Columns, shape: Shape
) -> tuple[dict[str, Any], list[multitask.Task]]:
    stages = (problem.first, problem.second)
    layer: Any
    if model == AITM:
        layer = multitask.AITM(stages, units=shape.width, tower_units=shape.towers)
    elif model == ESMM:
        layer = multitask.ESMM(stages)
    elif model in (IPW, DR):
        layer = multitask.ESCM2(stages, method="ipw" if model == IPW else "dr")
    else:
        layer = multitask.NaiveConversion(stages)
    body = model if model in (SINGLE, MMOE, PLE) else BOTTOM
    features = _body(body, layer.input_names, inputs, columns, shape)
    if model != AITM:
        features = {
            name: layers.Tower(shape.towers, name=f"{name}_tower")(x)
            for name, x in features.items()
        }
    return layer(features), layer.declared_tasks()


def _body(
    model: str,
    tasks: Sequence[str],
    inputs: dict[str, Any],
    columns: Columns,
    shape: Shape,
) -> dict[str, Any]:
    arguments = {"activation": shape.activation}
    if model != SINGLE:
        body = BODIES[model](shape.width, tasks, **arguments)
        return body(_features(inputs, columns, ""))
    found: dict[str, Any] = {}
    for task in tasks:
        bottom = layers.SharedBottom(
            shape.width, [task], name=f"{task}_bottom", **arguments
        )
        found |= bottom(_features(inputs, columns, f"{task}_"))
    return found


def _features(inputs: dict[str, Any], columns: Columns, prefix: str) -> Any:
    """Return the numbers and the rows of the tables, (n, d)."""
    found = [inputs["numbers"]] if columns.numbers else []
    for i, (name, size) in enumerate(columns.vocabulary):
        dimensions = min(MAX_DIMENSIONS, int(np.ceil(size**0.5)))
        table = keras.layers.Embedding(size, dimensions, name=f"{prefix}{name}_table")
        found.append(table(inputs["codes"][:, i]))
    return found[0] if len(found) == 1 else keras.layers.Concatenate()(found)


@cache
def equal_shape(
    problem: Problem, model: str, columns: Columns, bottom: Shape
) -> tuple[Shape, int]:
    """Return the shape of a model that has as many parameters as a shared bottom.

    Args:
        problem: the tasks.
        model: one of `problem.models`.
        columns: the inputs.
        bottom: the shape of the shared bottom.

    Returns:
        The shape, of the same towers, and the number of its parameters.
    """

    def parameters(model: str, width: int) -> int:
        shape = bottom._replace(width=width)
        return int(build_model(problem, model, columns, shape).count_params())

    target = parameters(BOTTOM, bottom.width)
    width = nearest_width(lambda width: parameters(model, width), target)
    return bottom._replace(width=width), parameters(model, width)


assert set(BODIES) < set(MODELS)
