"""Multi-task models: tasks, their losses, and how these are combined."""

from keras_moe.multitask import gradients, heads, weighting
from keras_moe.multitask.entire_space import (
    AITM,
    DBMTL,
    ESCM2,
    ESMM,
    NaiveConversion,
)
from keras_moe.multitask.joint_loss import JointLoss, Rows
from keras_moe.multitask.model import MultiTaskModel
from keras_moe.multitask.task import Task
from keras_moe.multitask.weighting import UncertaintyWeighting

__all__ = [
    "AITM",
    "DBMTL",
    "ESCM2",
    "ESMM",
    "JointLoss",
    "MultiTaskModel",
    "NaiveConversion",
    "Rows",
    "Task",
    "UncertaintyWeighting",
    "gradients",
    "heads",
    "weighting",
]
