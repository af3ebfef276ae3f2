"""Optimizers: one pass over each variable, and only the rows of a batch in tables.

`FusedAdam` and `FusedAdagrad` are Keras' optimizers with another update on TensorFlow
without XLA: one kernel reads and writes the variable and its slots once. `LazyAdam` and
`RowwiseAdagrad` are for models with tables (embeddings) of many rows: a step reads and
writes the rows of its batch alone.
"""

from keras_moe.optimizers._fused_adagrad import FusedAdagrad
from keras_moe.optimizers._fused_adam import FusedAdam
from keras_moe.optimizers._lazy_adam import LazyAdam
from keras_moe.optimizers._rowwise_adagrad import RowwiseAdagrad

__all__ = ["FusedAdagrad", "FusedAdam", "LazyAdam", "RowwiseAdagrad"]
