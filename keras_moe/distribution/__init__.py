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

__all__ = ["ExpertParallel", "VariablePlacement", "expert_parallel"]
