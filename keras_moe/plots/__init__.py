"""Plots of gates, experts and training, in one style. They need matplotlib.

Each takes the axes to draw on (`ax=`, by default the current ones) and returns them.
Colours are those of Okabe & Ito, for the colour-blind, visible on light and on dark
pages; lines differ in style and bars in hatches too. Without matplotlib, an ImportError
says what to install.
"""

from keras_moe.plots._experts import expert_similarity, load_over_time
from keras_moe.plots._gates import expert_usage, gate_heatmap, who_goes_where
from keras_moe.plots._training import calibration, gradient_conflict, learning_curves

__all__ = [
    "calibration",
    "expert_similarity",
    "expert_usage",
    "gate_heatmap",
    "gradient_conflict",
    "learning_curves",
    "load_over_time",
    "who_goes_where",
]
