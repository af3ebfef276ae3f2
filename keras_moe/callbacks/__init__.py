"""Callbacks: one figure for several tasks, backups, guards.

`CombinedMonitor` combines the figures of several tasks, to stop and to choose by.
`ExactBackup` saves the whole state of training; an interrupted `fit` ends as if it had
not been. `DatasetPosition` adds the position in a `tf.data` pipeline. `FiniteGuard`
applies no batch whose features or gradients are not finite.
"""

from keras_moe.callbacks._combined_monitor import CombinedMonitor
from keras_moe.callbacks._dataset_position import DatasetPosition
from keras_moe.callbacks._exact_backup import ExactBackup
from keras_moe.callbacks._finite_guard import FiniteGuard

__all__ = ["CombinedMonitor", "DatasetPosition", "ExactBackup", "FiniteGuard"]
