"""Mixture-of-Experts and multi-task recommender layers for Keras 3.

Layers: `keras_moe.layers` (MMoE, SharedBottom, Tower).
Parts:  `keras_moe.experts` (MLPExperts), `keras_moe.initializers` (PerExpert).
Models: `keras_moe.multitask` (MultiTaskModel, UncertaintyWeighting).
Sight:  `keras_moe.plots` (gate heatmap, expert usage), imported on demand because it
        needs matplotlib.
"""

from keras_moe import (
    experts,
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
    "initializers",
    "layers",
    "losses",
    "metrics",
    "multitask",
    "routers",
    "upcycling",
]
