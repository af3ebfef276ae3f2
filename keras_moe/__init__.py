"""Mixture-of-Experts and multi-task recommender layers for Keras 3.

Layers: `keras_moe.layers`. Sparse: MoE, HierarchicalMoE, SoftMoE. Multi-task:
        SharedBottom, OMoE, MMoE, CGC, PLE, AdaTT, STEM, HoME, CrossStitch, DSelectK,
        PEPNet (with its parts EPNet, PPNet, GateNU), and Tower, a task head. Several
        scenarios: STAR, M3oE, PartitionedNormalization.
Parts:  `keras_moe.routers` (assign tokens to experts), `keras_moe.experts` (expert
        networks), `keras_moe.losses` (auxiliary losses of routers), `keras_moe.metrics`
        (ranking, calibration, routing), `keras_moe.initializers` (PerExpert),
        `keras_moe.callbacks` (one figure for several tasks, backups, alarms),
        `keras_moe.telemetry` (what the experts of a model do),
        `keras_moe.optimizers` (Adam and Adagrad in one pass; tables of millions of
        rows).
Models: `keras_moe.multitask` (MultiTaskModel, UncertaintyWeighting),
        `keras_moe.upcycling` (convert a trained MLP to a MoE, add experts),
        `keras_moe.convert` (sparse blocks of KerasHub as MoE), `keras_moe.export`
        (SavedModel with one signature per task, ONNX, LiteRT, OpenVINO).
Plots:  `keras_moe.plots` (gates, experts, conflicts); `keras_moe.report` writes a page
        about a run. They need matplotlib, which is imported by the first plot.
"""

from keras_moe import (
    callbacks,
    convert,
    distribution,
    experts,
    export,
    initializers,
    layers,
    losses,
    metrics,
    multitask,
    optimizers,
    plots,
    routers,
    telemetry,
    upcycling,
)
from keras_moe._version import __version__
from keras_moe.report import report

__all__ = [
    "__version__",
    "callbacks",
    "convert",
    "distribution",
    "experts",
    "export",
    "initializers",
    "layers",
    "losses",
    "metrics",
    "multitask",
    "optimizers",
    "plots",
    "report",
    "routers",
    "telemetry",
    "upcycling",
]
