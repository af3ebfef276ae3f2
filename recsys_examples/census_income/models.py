"""The models that are compared: an embedding table, a shared body, task towers.

    x    the concatenated embeddings of all columns, and the numbers
    h_t  = body(x)_t          the layer that is compared, see `MODELS`
    y_t  = Tower_t(h_t)       a logit

The single-task baseline is a shared bottom per task: each task has its own embedding
table, bottom and tower.
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

MAX_EXPERT_UNITS = 2048  # total over the experts of a level, as in the MMoE paper


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a model and its training.

    Attributes:
        embedding: embedding size of a category.
        units: width of the first layer of an expert or of the bottom.
        depth: number of layers of an expert; the second has half the width.
        tower: width of the hidden layer of the towers; 0 for none.
        dropout: dropout rate of the hidden units of the experts.
        structure: arguments specific to the body, such as `num_experts`.
        learning_rate: initial learning rate of Adam, with cosine decay to 0.
        epochs: number of epochs.
        batch_size: rows per step.
        auxiliary_weight: loss weight of the auxiliary task; that of the main task is 1.
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
        body: function `(expert_units, tasks, dropout, **structure)` that returns the
            shared layer.
        experts: function `(**structure)` that returns the number of experts per level.
        structures: the values of `Settings.structure` to search.
        own_embeddings: whether each task has its own embeddings beside the shared ones.
        tasks_apart: whether each task has its own model.
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
    # The upper level has the experts of both tasks, of their group, and shared experts.
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
    """Return the kind of a model; `names.EQUAL_BOTTOM` is a shared bottom."""
    return MODELS[SHARED_BOTTOM if model == EQUAL_BOTTOM else model]


def expert_units(model: str, settings: Settings) -> int:
    """Return the total number of units of the experts of a level."""
    return settings.units * kind_of(model).experts(**settings.structure)


def build_models(
    model: str,
    settings: Settings,
    tasks: Sequence[str],
    table_rows: int,
    num_columns: int,
    num_numbers: int,
) -> list[keras.Model]:
    """Build one model for all tasks, or one model per task for `tasks_apart`.

    Args:
        model: one of `names.CHOICES`, or `names.EQUAL_BOTTOM`.
        settings: hyperparameters.
        tasks: names of the tasks.
        table_rows: number of rows of the shared embedding table.
        num_columns: number of categorical columns c.
        num_numbers: number of numeric columns k.

    Returns:
        Models from `[codes (b, c), numbers (b, k)]` to a dict of logits (b, 1), by
        task.
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
    # One lookup for all streams: a row of the table is their concatenated embeddings.
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
    """Return settings with the `units` that give about `target` parameters.

    Args:
        settings: all other settings.
        target: number of trainable parameters.
        count: function that returns the number of trainable parameters of settings,
            increasing in `units`.
    """

    def excess(units: int) -> int:
        return count(replace(settings, units=units)) - target

    above = 1 + bisect_left(range(1, 2 * MAX_EXPERT_UNITS), 0, key=excess)
    below = max(above - 1, 1)
    units = min((below, above), key=lambda width: abs(excess(width)))
    return replace(settings, units=units)
