"""Trained sparse blocks of KerasHub as `MoE`: the same outputs from the chosen experts.

KerasHub is not imported: its blocks are recognised by their classes.
"""

from keras_moe.convert._keras_hub import from_keras_hub
from keras_moe.convert._keras_hub_models import replace_keras_hub_blocks

__all__ = ["from_keras_hub", "replace_keras_hub_blocks"]
