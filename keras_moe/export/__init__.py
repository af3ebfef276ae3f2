"""Export for serving: SavedModel, ONNX, LiteRT and OpenVINO.

`keras.Model.export` writes all four formats. This package replaces a dispatch that the
format does not support, raises ValueError for a model that the runtime cannot execute,
and adds to a SavedModel a signature per task, preprocessing of raw features, warm-up
requests, checksums that `load` verifies, and errors that name the invalid feature.
Export needs the TensorFlow backend; a `.keras` file transfers a model from any other
backend.
"""

from keras_moe.export._client import Served, load
from keras_moe.export._converters import FORMATS, export_model
from keras_moe.export._loading import load_saved_model, write_checksums
from keras_moe.export._saved_model import export_saved_model

__all__ = [
    "FORMATS",
    "Served",
    "export_model",
    "export_saved_model",
    "load",
    "load_saved_model",
    "write_checksums",
]
