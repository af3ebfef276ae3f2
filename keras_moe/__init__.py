"""Mixture-of-Experts and multi-task recommender layers for Keras 3.

Layers: `keras_moe.layers`. Sparse: MoE, HierarchicalMoE, SoftMoE. For several tasks:
        SharedBottom, OMoE, MMoE, CGC, PLE, AdaTT, STEM, HoME, CrossStitch, DSelectK,
        PEPNet (with its parts EPNet, PPNet, GateNU), and Tower, the head of a task.
Parts:  `keras_moe.routers` (who goes where), `keras_moe.experts` (what computes),
        `keras_moe.losses` (what keeps routers balanced), `keras_moe.metrics` (what
        tells how they do), `keras_moe.initializers` (PerExpert).
Models: `keras_moe.multitask` (MultiTaskModel, UncertaintyWeighting),
        `keras_moe.upcycling` (a trained MLP becomes a mixture), `keras_moe.export`
        (SavedModel with a signature a task, ONNX, LiteRT, OpenVINO).
Sight:  `keras_moe.plots` (gate heatmap, expert usage), imported on demand because it
        needs matplotlib.
"""

from keras_moe import (
    experts,
    export,
    initializers,
    layers,
    losses,
    metrics,
    multitask,
    routers,
    upcycling,
)
from keras_moe._version import __version__

__all__ = [
    "__version__",
    "experts",
    "export",
    "initializers",
    "layers",
    "losses",
    "metrics",
    "multitask",
    "routers",
    "upcycling",
]
