"""Losses of mixtures: auxiliary losses of routers, and errors of local experts.

Auxiliary losses: load balancing, importance, load, z loss, entropy. Errors: the three
of Jacobs et al. 1991, of experts that cooperate or compete.

Pure functions of tensors. A loss returns a scalar, computed in float32 (float64 for
float64 tensors). Tokens outside the mask are ignored, even if their rows hold NaN; if
no token is left, a loss is 0. A mask may also be numeric: 0 is False, any other number
True.
"""

from keras_moe.losses._local_experts import (
    expected_squared_error,
    local_experts_loss,
    mixture_squared_error,
)
from keras_moe.losses._router import (
    auxiliary_losses,
    cv_squared,
    entropy,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    multi_gate_load_balancing_loss,
    router_z_loss,
)

__all__ = [
    "auxiliary_losses",
    "cv_squared",
    "entropy",
    "entropy_loss",
    "expected_squared_error",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "local_experts_loss",
    "mixture_squared_error",
    "multi_gate_load_balancing_loss",
    "router_z_loss",
]
