"""Training on many devices with `keras.distribution` (JAX).

`keras.distribution.DataParallel` needs nothing from here: sparse layers find it by
themselves. `expert_parallel` splits experts and tables over the devices, and `plan`
computes memory, communication and time before there is a device.
"""

from keras_moe.distribution._expert_parallel import (
    ExpertParallel,
    VariablePlacement,
    expert_parallel,
)
from keras_moe.distribution._plan import Plan, plan

__all__ = ["ExpertParallel", "Plan", "VariablePlacement", "expert_parallel", "plan"]
