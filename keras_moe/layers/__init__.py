"""Public Keras layers."""

from keras_moe.layers.adatt import AdaTT
from keras_moe.layers.cross_stitch import CrossStitch
from keras_moe.layers.dselect_k import DSelectK
from keras_moe.layers.extraction import CGC, PLE
from keras_moe.layers.hierarchical_moe import HierarchicalMoE
from keras_moe.layers.home import HoME
from keras_moe.layers.m3oe import M3oE
from keras_moe.layers.moe import MoE
from keras_moe.layers.multi_gate import MMoE, OMoE
from keras_moe.layers.partitioned_normalization import PartitionedNormalization
from keras_moe.layers.pepnet import EPNet, GateNU, PEPNet, PPNet
from keras_moe.layers.shared_bottom import SharedBottom
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.layers.star import STAR
from keras_moe.layers.stem import STEM
from keras_moe.layers.tower import Tower

__all__ = [
    "CGC",
    "PLE",
    "STAR",
    "STEM",
    "AdaTT",
    "CrossStitch",
    "DSelectK",
    "EPNet",
    "GateNU",
    "HierarchicalMoE",
    "HoME",
    "M3oE",
    "MMoE",
    "MoE",
    "OMoE",
    "PEPNet",
    "PPNet",
    "PartitionedNormalization",
    "SharedBottom",
    "SoftMoE",
    "Tower",
]
