"""Models of several tasks, and how their losses are weighed against each other."""

from keras_moe.multitask.model import MultiTaskModel
from keras_moe.multitask.weighting import UncertaintyWeighting

__all__ = ["MultiTaskModel", "UncertaintyWeighting"]
