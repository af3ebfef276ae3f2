"""Training on many devices with `keras.distribution` (JAX).

`keras.distribution.DataParallel` needs nothing from here: sparse layers find it by
themselves. `expert_parallel` splits experts and tables over the devices, `save` writes
one file of a model that is split over processes, and `plan` computes memory,
communication and time before there is a device.
"""

from keras_moe.distribution._expert_parallel import ExpertParallel, expert_parallel
from keras_moe.distribution._placements import VariablePlacement
from keras_moe.distribution._plan import Plan, plan
from keras_moe.distribution._save import save

__all__ = [
    "ExpertParallel",
    "Plan",
    "VariablePlacement",
    "expert_parallel",
    "plan",
    "save",
]
