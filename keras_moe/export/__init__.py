"""Models for servers: SavedModel, ONNX, LiteRT and OpenVINO.

`keras.Model.export` writes all four. This package adds what it lacks: a mixture takes
the dispatch that a format can carry, a file that its runtime could not run is refused,
and a SavedModel has a signature for every task, takes raw features, warms a server up
and names the feature that is wrong. Only the TensorFlow backend exports; a `.keras`
file brings a model there from any other.
"""

from keras_moe.export._client import Served, load
from keras_moe.export._converters import FORMATS, export_model
from keras_moe.export._saved_model import export_saved_model

__all__ = ["FORMATS", "Served", "export_model", "export_saved_model", "load"]
