"""Trained layers as a start: an MLP becomes a mixture, and a mixture gets more experts.

The new model computes the same outputs as the trained one at step 0. `revive` starts
dead experts again, in place.
"""

from keras_moe.upcycling._dense import moe_from_dense, upcycle
from keras_moe.upcycling._grow import grow
from keras_moe.upcycling._revive import revive

__all__ = ["grow", "moe_from_dense", "revive", "upcycle"]
