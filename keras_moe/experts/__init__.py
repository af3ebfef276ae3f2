"""Experts: the networks that a gate or a router weights or selects.

Axis letters: n rows, d input features, e experts, h hidden units, u output units,
c slots per expert.

Experts of one shape stack their weights, with the experts on the first axis: every
layer is one large matmul instead of e small ones.

A gate calls experts as a layer: every expert on every row. A dispatch groups the rows
by expert and calls one of three methods: `on_pieces`, `on_slots`, or `on_rows` (only
for stacked kernels). The protocols `Experts` and `GroupedExperts` describe them.
"""

# `restored_axes` keeps its old import path.
from keras_moe._backend import restored_axes  # noqa: F401
from keras_moe.experts._glu import GLUExperts
from keras_moe.experts._layers import LayerExperts
from keras_moe.experts._mlp import MLPExperts
from keras_moe.experts._protocol import Experts, GroupedExperts, GroupedMatmul
from keras_moe.experts._stacked import StackedKernels

__all__ = [
    "Experts",
    "GLUExperts",
    "GroupedExperts",
    "GroupedMatmul",
    "LayerExperts",
    "MLPExperts",
    "StackedKernels",
]
