"""The models that are compared: one embedding table, what the tasks share, towers.

    x    the embeddings of all columns side by side, and the numbers
    h_t  = body(x)_t          what is compared, see `MODELS`
    y_t  = Tower_t(h_t)       a log odds

A single-task model is a shared bottom with one task, so each task has a table, a bottom
and a tower for itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import keras
from keras import layers, ops

from keras_moe.layers import (
    PLE,
    STEM,
    AdaTT,
    HoME,
    MMoE,
    OMoE,
    SharedBottom,
    Tower,
)
from keras_moe.multitask import MultiTaskModel
from recsys_examples.census_income.names import (
    EQUAL_BOTTOM,
    SHARED_BOTTOM,
    SINGLE_TASK,
)

MAX_EXPERT_UNITS = 2048  # of all experts side by side, as in the MMoE paper


@dataclass(frozen=True)
class Settings:
    """What a model and its training are made of.

    Attributes:
        embedding: length of a category's vector.
        units: width of an expert's first layer, or of the bottom's.
        depth: layers of an expert; the second has half the width of the first.
        tower: width of the towers' hidden layer; 0 for none.
        dropout: share of the experts' hidden units that is dropped.
        structure: the arguments that the body has for itself, such as `num_experts`.
        learning_rate: of Adam, falling to 0 by a cosine.
        epochs: passes over the data.
        batch_size: rows a step.
        auxiliary_weight: weight of the auxiliary task's loss; the main one has 1.
    """

    embedding: int = 8
    units: int = 256
    depth: int = 1
    tower: int = 32
    dropout: float = 0.0
    structure: Mapping[str, int] = field(default_factory=dict)
    learning_rate: float = 3e-3
    epochs: int = 5
    batch_size: int = 1024
    auxiliary_weight: float = 0.3

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of an expert's layers."""
        return (self.units, max(1, self.units // 2))[: self.depth]


@dataclass(frozen=True)
class Kind:
    """One of the models.

    Attributes:
        body: makes the layer that the tasks share, from `(widths, tasks, dropout,
            **structure)`.
        experts: tells how many experts a structure has side by side.
        structures: those that the search draws from.
        own_embeddings: whether each task has embeddings for itself beside the shared
            ones.
        tasks_apart: whether each task gets a model for itself.
    """

    body: Callable[..., keras.layers.Layer]
    experts: Callable[..., int] = lambda: 1
    structures: Sequence[Mapping[str, int]] = ({},)
    own_embeddings: bool = False
    tasks_apart: bool = False


def _bottom(
    expert_units: Sequence[int], tasks: Sequence[str], dropout: float
) -> keras.layers.Layer:
    return SharedBottom(expert_units, tasks, dropout=dropout)


def _pooled(num_experts: int, top_k: int = 0) -> int:
    return num_experts


def _grouped(
    num_task_experts: int, num_shared_experts: int = 0, num_levels: int = 1
) -> int:
    return 2 * num_task_experts + num_shared_experts


def _hierarchical(num_task_experts: int, num_shared_experts: int) -> int:
    # The upper level has the experts of both tasks, of their group and the shared ones.
    return 3 * num_task_experts + num_shared_experts


_POOLS = [{"num_experts": e} for e in (2, 4, 8)]
_SPARSE_POOLS = [{"num_experts": e, "top_k": k} for e, k in ((4, 2), (8, 2), (8, 4))]
_EXTRACTIONS = [
    {"num_levels": level, "num_shared_experts": s, "num_task_experts": m}
    for level in (1, 2)
    for s, m in ((1, 1), (2, 1), (2, 2))
]
_FUSIONS = [
    {"num_levels": level, "num_shared_experts": s, "num_task_experts": m}
    for level in (1, 2)
    for s, m in ((0, 1), (0, 2), (1, 1), (2, 2))
]
_PAIRS = [
    {"num_shared_experts": s, "num_task_experts": m}
    for s, m in ((1, 1), (2, 1), (2, 2))
]

MODELS: dict[str, Kind] = {
    SINGLE_TASK: Kind(_bottom, tasks_apart=True),
    SHARED_BOTTOM: Kind(_bottom),
    "OMoE": Kind(OMoE, _pooled, _POOLS),
    "MMoE": Kind(MMoE, _pooled, _POOLS),
    "sparse MMoE": Kind(MMoE, _pooled, _SPARSE_POOLS),
    "PLE": Kind(PLE, _grouped, _EXTRACTIONS),
    "AdaTT": Kind(AdaTT, _grouped, _FUSIONS),
    "STEM": Kind(STEM, _grouped, _PAIRS, own_embeddings=True),
    "HoME": Kind(HoME, _hierarchical, _PAIRS),
}


def kind_of(model: str) -> Kind:
    """Return what a model is; the bottom of equal size is a shared bottom."""
    return MODELS[SHARED_BOTTOM if model == EQUAL_BOTTOM else model]


def expert_units(model: str, settings: Settings) -> int:
    """Return how many units the experts of a level have together."""
    return settings.units * kind_of(model).experts(**settings.structure)


def build_models(
    model: str,
    settings: Settings,
    tasks: Sequence[str],
    table_rows: int,
    num_columns: int,
    num_numbers: int,
) -> list[keras.Model]:
    """Build one model for all tasks, or one a task if the tasks are kept apart.

    Args:
        model: one of `names.CHOICES`, or `names.EQUAL_BOTTOM`.
        settings: its sizes.
        tasks: their names.
        table_rows: categories of all columns together.
        num_columns: columns of the codes c.
        num_numbers: columns of the numbers k.

    Returns:
        Models from `[codes (b, c), numbers (b, k)]` to a log odds (b, 1) by task.
    """
    build = partial(
        _build,
        kind_of(model),
        settings,
        table_rows=table_rows,
        num_columns=num_columns,
        num_numbers=num_numbers,
    )
    if kind_of(model).tasks_apart:
        return [build([task]) for task in tasks]
    return [build(tasks)]


def _build(
    kind: Kind,
    settings: Settings,
    tasks: Sequence[str],
    table_rows: int,
    num_columns: int,
    num_numbers: int,
) -> keras.Model:
    codes = keras.Input((num_columns,), dtype="int32", name="codes")
    numbers = keras.Input((num_numbers,), name="numbers")
    streams = 1 + len(tasks) if kind.own_embeddings else 1
    # One lookup serves all streams: a row of the table holds their vectors in turn.
    vectors = layers.Embedding(
        table_rows,
        streams * settings.embedding,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.3),
        name="categories",
    )(codes)
    body = kind.body(
        expert_units=settings.widths,
        tasks=list(tasks),
        dropout=settings.dropout,
        **settings.structure,
    )
    if kind.own_embeddings:
        split = ops.reshape(vectors, (-1, num_columns, streams, settings.embedding))
        by_stream = ops.reshape(
            ops.transpose(split, (0, 2, 1, 3)),
            (-1, streams, num_columns * settings.embedding),
        )
        repeated = ops.repeat(ops.expand_dims(numbers, 1), streams, axis=1)
        inputs = ops.concatenate([by_stream, repeated], axis=-1)
        shared = body(inputs[:, 0], task_inputs=inputs[:, 1:])
    else:
        flat = ops.reshape(vectors, (-1, num_columns * settings.embedding))
        shared = body(ops.concatenate([flat, numbers], axis=-1))
    hidden = (settings.tower,) if settings.tower else ()
    outputs: dict[str, Any] = {
        task: Tower(hidden, name=f"{task}_tower")(shared[task]) for task in tasks
    }
    return MultiTaskModel([codes, numbers], outputs)


def parameters(models: Sequence[keras.Model]) -> int:
    """Return the number of trainable parameters."""
    weights = [weight for model in models for weight in model.trainable_weights]
    return sum(int(ops.size(weight)) for weight in weights)


def of_equal_size(
    settings: Settings, target: int, count: Callable[[Settings], int]
) -> Settings:
    """Return settings with the width at which a model has about `target` parameters.

    Args:
        settings: all but the width.
        target: number of trainable parameters.
        count: tells how many some settings make; more for a larger width.
    """

    def missing(units: int) -> int:
        return count(replace(settings, units=units)) - target

    above = 1 + bisect_left(range(1, 2 * MAX_EXPERT_UNITS), 0, key=missing)
    below = max(above - 1, 1)
    units = min((below, above), key=lambda width: abs(missing(width)))
    return replace(settings, units=units)
