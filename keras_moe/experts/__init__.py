"""Experts: the networks that a gate or a router chooses between.

Axis letters: n rows, d input features, e experts, h hidden units, u output units,
c slots an expert.

Experts of one shape keep their weights as one tensor with the experts on the first
axis, so that every step is one large matmul instead of e small ones.

A gate calls experts as a layer, every expert on every row. A dispatch sorts the rows by
expert and calls one of the three methods in `_protocol`: `on_pieces`, `on_slots`, or
`on_rows`, which only experts with stacked kernels have.
"""

from keras_moe.experts._glu import GLUExperts
from keras_moe.experts._layers import LayerExperts
from keras_moe.experts._mlp import MLPExperts

__all__ = ["GLUExperts", "LayerExperts", "MLPExperts"]
