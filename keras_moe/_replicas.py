"""The replicas of a `tf.distribute` strategy, and the strategies that cannot train.

The replicas of `MirroredStrategy` are threads that call the same layers. A sum over
replicas pauses one of them in the middle of a call, while the others run.
"""

from __future__ import annotations

import threading
from typing import Any

import keras


def current() -> int | None:
    """Return the number of the replica that this code runs for; None without any."""
    strategy = _strategy()
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None:
        return None
    # None on a TPU, whose replicas are one graph.
    number = tf.get_static_value(context.replica_id_in_sync_group)
    return None if number is None else int(number)


def check_not_compiled(name: str) -> None:
    """Raise ValueError if XLA would compile the replicas of `MirroredStrategy` as one.

    TensorFlow then fails with "Trying to access resource", whatever the model.
    """
    if current() is None:
        return
    from tensorflow.python.ops import control_flow_util

    # Of the replica's thread. A function with `jit_compile=True` in a replica has
    # another graph, and TensorFlow can compile it.
    graph = getattr(threading.current_thread(), "graph", None)
    if graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise ValueError(_NOT_COMPILED.format(name=name))


def check_trains(model: Any, jit_compile: Any = None) -> None:
    """Raise ValueError if Keras 3 cannot train `model` under its strategy."""
    strategy = getattr(model, "_distribute_strategy", None) or _strategy()
    if strategy is None:
        return
    name, kind = type(model).__name__, type(strategy).__name__
    several = strategy.num_replicas_in_sync > 1
    # Its class has another name. One worker with one device trains.
    if kind == "CollectiveAllReduceStrategy":
        kind = "MultiWorkerMirroredStrategy"
    workers = several and kind.startswith("MultiWorkerMirrored")
    if workers or kind.startswith("ParameterServer"):
        raise ValueError(
            f"{name} cannot be trained under {kind}, with which `fit` of Keras 3 "
            "fails: wrap the layers in keras_moe.tfrs.LegacyLayer for a model of "
            "tf_keras, which can, or use the JAX backend with "
            "keras.distribution.DataParallel. "
            f"Received: a strategy of {strategy.num_replicas_in_sync} replicas"
        )
    if jit_compile is True and several and kind == "MirroredStrategy":
        raise ValueError(_NOT_COMPILED.format(name=name))


_NOT_COMPILED = (
    "`jit_compile` must not be True under MirroredStrategy, whose replicas TensorFlow "
    "cannot compile as one program: compile {name} with jit_compile=False, or use the "
    "JAX backend with keras.distribution.DataParallel. Received: jit_compile=True"
)


def _strategy() -> Any:
    """Return the current strategy of TensorFlow; None on other backends."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy()
