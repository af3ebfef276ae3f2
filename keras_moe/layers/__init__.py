"""The layers that a user puts in a model."""

from keras_moe.layers.moe import HierarchicalMoE, MoE
from keras_moe.layers.multi_gate import MMoE, SharedBottom
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.layers.tower import Tower

__all__ = ["HierarchicalMoE", "MMoE", "MoE", "SharedBottom", "SoftMoE", "Tower"]
