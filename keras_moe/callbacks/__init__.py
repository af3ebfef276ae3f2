"""Callbacks: one figure for several tasks, sight of the experts, backups, guards.

`CombinedMonitor` combines the figures of several tasks, to stop and to choose by.
`ExactBackup` saves the whole state of training; an interrupted `fit` ends as if it had
not been. `DatasetPosition` adds the position in a `tf.data` pipeline. `FiniteGuard`
applies no batch whose features or gradients are not finite. `ExpertMonitor` observes
every mixture of a model on a sample; `CollapseAlarm` warns if one collapses.
"""

from keras_moe.callbacks._collapse_alarm import Alarm, CollapseAlarm
from keras_moe.callbacks._combined_monitor import CombinedMonitor
from keras_moe.callbacks._dataset_position import DatasetPosition
from keras_moe.callbacks._exact_backup import ExactBackup
from keras_moe.callbacks._expert_monitor import ExpertMonitor
from keras_moe.callbacks._finite_guard import FiniteGuard

__all__ = [
    "Alarm",
    "CollapseAlarm",
    "CombinedMonitor",
    "DatasetPosition",
    "ExactBackup",
    "ExpertMonitor",
    "FiniteGuard",
]
