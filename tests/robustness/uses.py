"""How an object of each class is used, on three rows, and which numbers come of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_moe
from keras_moe import layers, metrics, multitask, routers, routing
from keras_moe.experts import StackedKernels
from keras_moe.metrics._buffer import BufferedMetric
from keras_moe.multitask import gradients, heads, weighting
from keras_moe.multitask.entire_space._base import EntireSpace

_rng = np.random.default_rng(0)
X = _rng.normal(size=(3, 6)).astype("float32")
SEQUENCES = _rng.normal(size=(2, 3, 6)).astype("float32")
FURTHER = _rng.normal(size=(3, 3)).astype("float32")
IDS = np.array([0, 1, 0], "int32")
LABELS = np.array([1.0, 0.0, 1.0, 0.0], "float32")
SCORES = np.array([0.9, 0.1, 0.4, 0.6], "float32")
GROUPS = np.array([3, 3, 4, 4], "int32")

# Base classes: what they leave to a subclass cannot be called.
ABSTRACT = (
    routers.Router,
    StackedKernels,
    weighting.LossWeighting,
    gradients.GradientWeighting,
    multitask.JointLoss,
    heads.Head,
)


def flat(outputs: Any) -> list[np.ndarray]:
    """The outputs as arrays, half precision as float32."""
    arrays = []
    for output in keras.tree.flatten(outputs):
        if output is None:
            continue
        tensor = ops.convert_to_tensor(output)
        if keras.backend.standardize_dtype(tensor.dtype) in ("bfloat16", "float16"):
            tensor = ops.cast(tensor, "float32")
        arrays.append(np.asarray(ops.convert_to_numpy(tensor)))
    return arrays


def inputs_of(layer: Any) -> tuple[Any, ...]:
    """The inputs of a call of `layer`."""
    scenarios = (layers.STAR, layers.M3oE, layers.PartitionedNormalization)
    if isinstance(layer, scenarios):
        return X, IDS
    if isinstance(layer, layers.EPNet | layers.PEPNet):
        return X, FURTHER
    if isinstance(layer, layers.SoftMoE):
        return (SEQUENCES,)
    if isinstance(layer, multitask.AITM):
        return ({stage: X for stage in layer.stages},)
    if isinstance(layer, EntireSpace):
        return ({name: X[:, :1] for name in layer.input_names},)
    if isinstance(layer, multitask.DBMTL):
        return ({task: X for task in layer.parents},)
    if isinstance(layer, gradients.GradientWeighting):
        return np.array([[2.0, 0.5], [0.5, 1.0]], "float32"), _task_losses(2)
    if isinstance(layer, weighting.LossWeighting):
        own = getattr(layer, "task_weights", getattr(layer, "min_losses", None))
        return (_task_losses(len(own) if isinstance(own, list) else 2),)
    if isinstance(layer, routers.HashRouter):
        return (IDS,)
    return (X,)


def _task_losses(count: int) -> np.ndarray:
    return np.linspace(0.5, 1.5, count).astype("float32")


def call(layer: Any, training: bool | None = None) -> Any:
    """The outputs of a call."""
    given: dict[str, Any] = {}
    arguments = inspect.signature(layer.call).parameters
    if "training" in arguments:
        given["training"] = training
    if getattr(getattr(layer, "router", None), "reads_ids", False):
        given["router_inputs"] = IDS
    return layer(*inputs_of(layer), **given)


def expected_shapes(layer: Any) -> Any:
    """What the layer says that the shapes of its outputs are; None if it does not."""
    skipped = (routers.Router, weighting.LossWeighting, gradients.GradientWeighting)
    if isinstance(layer, skipped):
        return None
    shapes = keras.tree.map_structure(lambda x: tuple(x.shape), inputs_of(layer))
    return layer.compute_output_shape(*shapes)


def use_metric(metric: Any) -> Any:
    if isinstance(metric, metrics.RoutingMetrics):
        e = metric.num_experts
        probs = np.full((3, e), 1.0 / e, "float32")
        indices = np.zeros((3, 1), "int32")
        record = routing.Routing(indices, probs[:, :1], np.log(probs), probs)
        metric.update_state(record)
    elif isinstance(metric, metrics.GatePolarization):
        metric.update_state(np.array([[[0.95, 0.05], [0.5, 0.5]]], "float32"))
    elif isinstance(metric, metrics.BySegment):
        segments = np.array([0, 0, 0, 0], "int32")
        metric.update_state(LABELS, SCORES, groups=segments)
    elif isinstance(metric, BufferedMetric):
        metric.update_state(LABELS, SCORES, groups=GROUPS)
    else:
        metric.update_state(LABELS, SCORES)
    return metric.result()


def use_loss(loss: Any) -> Any:
    name = type(loss).__name__
    outputs = {
        "ClassLoss": np.full((4, 3), 1 / 3, "float32"),
        "OrdinalLoss": np.array([[0.6, 0.3]] * 4, "float32"),
        "ZILNLoss": np.full((4, 3), 0.5, "float32"),
    }.get(name, SCORES[:, None])
    labels = LABELS
    if name == "RankingLoss":
        labels, outputs = LABELS[None], SCORES[None]
    return loss(labels, outputs)


def use_optimizer(optimizer: Any) -> Any:
    variables = [
        keras.Variable(np.ones((3, 2), "float32"), name="embeddings"),
        keras.Variable(np.ones((2, 2), "float32"), name="kernel"),
    ]
    optimizer.build(variables)
    for step in (1.0, 0.5):
        gradients_ = [ops.convert_to_tensor(step * np.ones(v.shape)) for v in variables]
        gradients_ = [ops.cast(g, "float32") for g in gradients_]
        optimizer.apply(gradients_, variables)
    return [ops.convert_to_numpy(v) for v in variables]


def use_task(task: Any) -> Any:
    tower = task.tower((4,))
    outputs = tower(X)
    tower.set_weights([0.1 * np.ones(w.shape) for w in tower.weights])
    labels = {key: np.array([1.0, 0.0, 1.0], "float32") for key in task.keys}
    task.get_config()
    rows = task.rows(labels, outputs)
    return [rows.labels, rows.weights]


def use_head(head: Any) -> Any:
    return [np.array(head.output_units), head.valid(np.zeros((3, 1)))]


class _Entries(keras.callbacks.Callback):
    """Adds entries to the logs, as metrics do."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = names

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs.update(dict.fromkeys(self._names, 0.5))


def use_callback(callback: Any) -> Any:
    """Fit a model on three batches; for a guard, the second is not finite."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    x, used = X.copy(), [callback]
    is_guard = isinstance(callback, keras_moe.callbacks.FiniteGuard)
    if is_guard:
        x[1, 2] = np.nan
    if isinstance(callback, keras_moe.callbacks.CombinedMonitor):
        used = [_Entries(callback.weights), callback]
    before = model.get_weights()[0]
    history, stopped = {}, ""
    try:
        fitted = model.fit(x, x[:, :1], 1, shuffle=False, callbacks=used, verbose=0)
        history = fitted.history
    except FloatingPointError as error:
        stopped = str(error)
    if is_guard and (callback.action == "stop" or callback.max_in_a_row == 1):
        assert "batch 2: feature" in stopped, stopped
    elif is_guard:
        assert history["skipped_batches"] == [1], history
    assert not np.array_equal(model.get_weights()[0], before), "nothing was trained"
    entry = getattr(callback, "name", None)
    return [*model.get_weights(), *([np.array(history[entry])] if entry else [])]


USES: list[tuple[type, Callable[[Any], Any]]] = [
    (keras.metrics.Metric, use_metric),
    (keras.losses.Loss, use_loss),
    (keras.optimizers.Optimizer, use_optimizer),
    (keras.callbacks.Callback, use_callback),
    (keras.initializers.Initializer, lambda made: made((4, 3, 2))),
    (multitask.Task, use_task),
    (heads.Head, use_head),
]


def numbers(made: Any) -> list[np.ndarray]:
    """The numbers that come of an object which is not a layer."""
    for kind, use in USES:
        if isinstance(made, kind):
            return flat(use(made))
    raise NotImplementedError(f"tests/robustness/uses.py has no use of {type(made)}")


def may_be_nan(made: Any) -> bool:
    """Whether the documented result of the use is NaN."""
    if isinstance(made, weighting.FAMO):  # A loss below its minimum.
        return bool(np.max(made.min_losses) >= 0.5)
    return isinstance(made, BufferedMetric) and made.max_rows < len(LABELS)
