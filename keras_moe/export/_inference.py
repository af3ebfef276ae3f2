"""What an exported model does not need: the routing metrics of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras

from keras_moe.metrics import RoutingMetrics


@contextmanager
def without_metrics(model: keras.Model) -> Iterator[None]:
    """Stop the updates of routing metrics: a server has no use for them."""
    active = [
        metric
        for layer in model._flatten_layers()
        for metric in layer._metrics
        if isinstance(metric, RoutingMetrics) and metric.active
    ]
    for metric in active:
        metric.active = False
    try:
        yield
    finally:
        for metric in active:
            metric.active = True
