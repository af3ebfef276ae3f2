"""Training with a gradient for every task, or with the losses after the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe.multitask import _train_steps
from keras_moe.multitask._combine import combine
from keras_moe.multitask._fit_arguments import FitArguments
from keras_moe.multitask._train_steps import LossParts
from keras_moe.multitask.gradients import GradientWeighting


class PerTaskTraining(FitArguments):
    """A model whose training step serves every kind of loss weighting."""

    loss_weighting: Any
    shared_layers: Sequence[str] | None

    def train_step(self, *args: Any) -> Any:
        if self.per_task_gradients or self.needs_new_losses:
            return _train_steps.train_step(self, *args)
        return super().train_step(*args)

    def compute_loss_and_updates(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss and what it changes; Keras calls this on JAX alone.

        The outputs of a differentiated function are new tensors, without the masks
        that the metrics need.
        """
        loss, aux = super().compute_loss_and_updates(*args, **kwargs)
        unscaled, outputs, *variables = aux
        masks = {name: _backend.keras_mask(part) for name, part in outputs.items()}
        if any(mask is not None for mask in masks.values()):
            outputs = (outputs, masks)
        return loss, (unscaled, outputs, *variables)

    def with_masks(self, outputs: Any) -> dict[str, Any]:
        """Return the outputs with the masks of `compute_loss_and_updates`."""
        if isinstance(outputs, dict):
            return outputs
        outputs, masks = outputs
        attach = _backend.attach_keras_mask
        return {name: attach(part, masks[name]) for name, part in outputs.items()}

    @property
    def per_task_gradients(self) -> bool:
        """Whether a training step computes a gradient for every task."""
        return isinstance(self.loss_weighting, GradientWeighting)

    @property
    def needs_new_losses(self) -> bool:
        """Whether a training step also computes the losses after its update."""
        return getattr(self.loss_weighting, "needs_new_losses", False)

    def differentiated(self, total: Any, parts: LossParts) -> list[Any]:
        """Return the scalars that a training step differentiates."""
        if not self.per_task_gradients:
            return [total]
        losses = parts.losses / _backend.num_replicas()
        return [*ops.unstack(losses, num=losses.shape[0]), parts.rest]

    def combined(self, gradients: Any, parts: LossParts, scale: Any) -> list[Any]:
        """Return one gradient per trainable variable.

        Args:
            gradients: for each of `differentiated`, its gradients.
            parts: the losses of the batch.
            scale: the factor of an optimizer with loss scaling.
        """
        if not self.per_task_gradients:
            return list(gradients[0])
        return combine(
            gradients[:-1],
            gradients[-1],
            self.loss_weighting,
            task_losses=parts.losses,
            mask=parts.mask,
            shared=self._shared_flags(),
            # Gradients of replicas are averaged.
            scale=scale / _backend.num_replicas(),
        )

    def _shared_flags(self) -> list[bool] | None:
        if self.shared_layers is None:
            return None
        shared = {
            id(variable)
            for name in self.shared_layers
            for variable in self.get_layer(name).trainable_variables
        }
        return [id(variable) in shared for variable in self.trainable_variables]
