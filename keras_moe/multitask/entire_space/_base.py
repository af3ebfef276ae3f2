"""Chains of events, such as click and then conversion, over all impressions.

Axis letters: n rows, s stages.

Stage i happens only where stage i - 1 happened. The layers map the logits of the
conditional probabilities p_i = P(stage i | stage i - 1, x) to probabilities over the
entire space: P(stages 1..i | x) = p_1 p_2 ... p_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe._layer import Layer
from keras_moe.layers._tasks import Tasks
from keras_moe.multitask.task import Task


class EntireSpace(Layer):
    """The base class of models of a chain of events.

    Args:
        stages: the names of the events, first to last, at least two.
    """

    takes_dict = True

    def __init__(
        self, stages: Sequence[str] = ("click", "conversion"), **kwargs: Any
    ) -> None:
        # Probabilities are multiplied in float32 under any dtype policy.
        super().__init__(autocast=False, **kwargs)
        self.stages = Tasks(stages, "stages").keys
        if len(self.stages) < 2:
            raise ValueError(
                "`stages` must name at least two events. "
                f"Received: stages={list(stages)!r}"
            )
        self.joint_names = tuple(
            "_and_".join(self.stages[: i + 1]) for i in range(len(self.stages))
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """The keys of the inputs."""
        return self.stages

    def build(self, input_shape: Mapping[str, Any]) -> None:
        self._check_keys(input_shape)
        self._check_shapes(input_shape)

    def _check_shapes(self, shapes: Mapping[str, Any]) -> None:
        """Raise ValueError unless every input is a logit."""
        for name in self.input_names:
            if tuple(shapes[name])[-1:] != (1,):
                raise ValueError(
                    f"{type(self).__name__} expects logits of shape (n, 1), such as "
                    f"those of a Tower. Received: {name!r} of shape "
                    f"{tuple(shapes[name])}"
                )

    def _check_keys(self, inputs: Any) -> None:
        given = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        if not isinstance(given, list) or set(given) != set(self.input_names):
            raise ValueError(
                f"{type(self).__name__} expects a dict of logits with the keys "
                f"{list(self.input_names)}. Received: {given}"
            )

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self._check_keys(inputs)
        logits = [ops.cast(inputs[stage], self.precise_dtype) for stage in self.stages]
        conditional = [keras.activations.sigmoid(logit) for logit in logits]
        outputs = dict(zip(self.stages, conditional, strict=True))
        # In log space: a product of probabilities near 1e-37 would underflow first.
        log_joint = keras.activations.log_sigmoid(logits[0])
        for name, logit in zip(self.joint_names[1:], logits[1:], strict=True):
            log_joint = log_joint + keras.activations.log_sigmoid(logit)
            outputs[name] = ops.exp(log_joint)
        return outputs

    def compute_output_shape(self, input_shape: Mapping[str, Any]) -> dict[str, Any]:
        shapes = {stage: tuple(input_shape[stage]) for stage in self.stages}
        first = shapes[self.stages[0]]
        return {**shapes, **dict.fromkeys(self.joint_names[1:], first)}

    def compute_output_spec(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self._check_keys(inputs)
        shapes = self.compute_output_shape({k: v.shape for k, v in inputs.items()})
        return {
            name: keras.KerasTensor(shape, dtype=self.precise_dtype)
            for name, shape in shapes.items()
        }

    def declared_tasks(
        self, metrics: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Task]:
        """Return the tasks for `MultiTaskModel(..., tasks=)`.

        Args:
            metrics: dict by output name of sequences of metrics. The metrics of a
                stage count the rows where the previous stage happened.
        """
        metrics = dict(metrics or {})
        unknown = [n for n in metrics if n not in (*self.stages, *self.joint_names)]
        if unknown:
            raise ValueError(
                "the keys of `metrics` must be outputs of the layer, "
                f"{[*self.stages, *self.joint_names[1:]]}. Received: {unknown[0]!r}"
            )
        return self._declare(metrics)

    def _declare(self, metrics: Mapping[str, Sequence[Any]]) -> list[Task]:
        raise NotImplementedError

    def _first(self, metrics: Mapping[str, Sequence[Any]]) -> Task:
        """Return the task of the first stage."""
        return Task(self.stages[0], metrics=metrics.get(self.stages[0], ()))

    def _conditional(
        self, i: int, metrics: Mapping[str, Sequence[Any]], loss: Any
    ) -> Task:
        """Return the task of stage i > 0 on rows where all stages before happened."""
        stage = self.stages[i]
        return Task(
            stage,
            # Of a stage after one that did not happen, the label may be anything.
            defined=self.stages[:i],
            loss=loss,
            metrics=metrics.get(stage, ()),
        )

    def _joint(self, i: int, metrics: Mapping[str, Sequence[Any]], loss: Any) -> Task:
        """Return the task of the stages up to i > 0 on all rows."""
        name = self.joint_names[i]
        return Task(
            name,
            label=self.stages[: i + 1],
            loss=loss,
            metrics=metrics.get(name, ()),
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "stages": list(self.stages)}
