"""The layers that a user puts in a model."""

from keras_moe.layers.adatt import AdaTT
from keras_moe.layers.extraction import CGC, PLE
from keras_moe.layers.moe import HierarchicalMoE, MoE
from keras_moe.layers.multi_gate import MMoE, OMoE, SharedBottom
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.layers.stem import STEM
from keras_moe.layers.tower import Tower

__all__ = [
    "CGC",
    "PLE",
    "STEM",
    "AdaTT",
    "HierarchicalMoE",
    "MMoE",
    "MoE",
    "OMoE",
    "SharedBottom",
    "SoftMoE",
    "Tower",
]
