"""Multi-task models and weighting of their losses and gradients."""

from keras_moe.multitask.model import MultiTaskModel
from keras_moe.multitask.weighting import UncertaintyWeighting

__all__ = ["MultiTaskModel", "UncertaintyWeighting"]
