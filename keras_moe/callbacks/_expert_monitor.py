"""Figures of every mixture of a model during `fit`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_moe import _backend, _checks, telemetry
from keras_moe.callbacks._tensorboard import TensorBoardWriter
from keras_moe.multitask import MultiTaskModel
from keras_moe.telemetry._conflict import GradientConflict, check_rows


class ExpertMonitor(keras.callbacks.Callback):
    """Observes every mixture of a model on a sample of rows, during `fit`.

    A mixture fails silently: a router uses few experts, a gate polarizes, units go
    silent, while the loss looks fine. At the end of each epoch the model is called on
    the sample, in inference and outside of the compiled step, which stays as it is. So
    it works with and without `jit_compile`, on every backend and under
    `tf.distribute.MirroredStrategy`. Every mixture is found by itself: `MoE` and the
    layers with gates, of several levels too, also inside other layers.

    The figures are in four places:

    - `observations`, with all arrays; see `keras_moe.telemetry.summarise`.
    - the logs of the epoch, and so the progress bar, `history`, `CSVLogger` and the
      callbacks of wandb and mlflow: for each mixture `{name}_load_cv`,
      `{name}_least_used` (the smallest relative usage of an expert: 1 if even, 0 if
      dead), `{name}_largest_weight`, `{name}_entropy`, and, if they exist,
      `{name}_dropped`, `{name}_zero_activations` and `{name}_output_similarity`, as
      means; with `y`, `lowest_gradient_cosine`.
    - `file`, one line of JSON an observation.
    - `log_dir`, for TensorBoard: scalars, histograms and pictures. Pictures are drawn
      for the first and the last observation of a `fit`, and between them while they
      take at most 1% of its time.

    Args:
        x: a sample of what `fit` reads: an array, or a list or dict of arrays, of equal
            numbers of rows. 500 to 2,000 rows are a good size; with a router, at least
            20 rows an expert and choice.
        y: the labels of the sample, in the form that `fit` takes. With it, the
            gradients of the tasks of a `MultiTaskModel` are compared.
        sample_weight: the weights of the sample, in that form.
        every_steps: int, number of batches between two observations. Default: one at
            the end of each epoch.
        file: str or path, a file to which lines of JSON are added.
        log_dir: str or path, a folder for TensorBoard. Needs the packages tensorflow,
            tensorboard and matplotlib.

    Attributes:
        observations: list of dicts, those of the last `fit`, with "epoch", "step" (the
            batches trained so far, also by earlier calls of `fit`), "mixtures" (a dict
            from the name to its figures, "gates" and "top_k"), "gradient_cosines" and
            "tasks".
        seconds: float, the time that they have taken. The check when `fit` begins is
            not in it.
        is_in_fit: bool, whether a `fit` has begun that has not ended.

    Place it before the callbacks that read its figures.

    Raises:
        ValueError: if an argument is invalid; in `fit`, if the model is not built or
            has no mixture, or if `y` is given and it is no `MultiTaskModel` of two
            tasks or more.
        ImportError: if `log_dir` is given and a package is missing.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    >>> inputs = keras.Input((4,))
    >>> hidden = keras_moe.layers.MoE(4, (8, 8), name="moe")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    >>> model.compile("adam", "mse")
    >>> monitor = keras_moe.callbacks.ExpertMonitor(x)
    >>> history = model.fit(x, x[:, :1], epochs=2, callbacks=[monitor], verbose=0)
    >>> sorted(history.history)[:3]
    ['loss', 'moe_dropped', 'moe_entropy']
    >>> monitor.observations[-1]["mixtures"]["moe"]["load"].shape
    (4,)
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        every_steps: int | None = None,
        file: str | Path | None = None,
        log_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_rows(x=x, y=y, sample_weight=sample_weight)
        if sample_weight is not None and y is None:
            raise ValueError(
                "`sample_weight` must be None without `y`. Received: a sample_weight"
            )
        self._x, self._y, self._sample_weight = x, y, sample_weight
        if every_steps is not None:
            every_steps = _checks.positive_int("every_steps", every_steps)
        self._every_steps = every_steps
        self._file = None if file is None else _checks.path("file", file)
        self._board = None
        if log_dir is not None:
            self._board = TensorBoardWriter(_checks.path("log_dir", log_dir))
        self.observations: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.is_in_fit = False
        self._layers: dict[str, Any] = {}

    def layer_of(self, mixture: str) -> keras.layers.Layer:
        """Return the layer of a mixture of the last observation."""
        return self._layers[mixture]

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the model."""
        is_multi_task = isinstance(self.model, MultiTaskModel)
        if self._y is not None and not (is_multi_task and len(self.model.tasks) > 1):
            raise ValueError(
                "`y` must be None unless the model is a MultiTaskModel of two tasks or "
                "more, whose gradients are compared. "
                f"Received: y with a model of type {type(self.model).__name__}"
            )
        # At once, not after the first epoch: whatever fails in an observation.
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if self._file.is_dir():
                raise ValueError(
                    f"`file` must be a file. Received: {self._file}, which is a folder"
                )
            self._file.open("a", encoding="utf-8").close()
        telemetry.observe(self.model, self._x)
        self._conflict = None if self._y is None else GradientConflict(self.model)
        self._conflict_of_tasks()
        self.observations, self.seconds = [], 0.0
        self._step = self._before = _steps_so_far(self.model.optimizer)
        self._epoch = 0
        if self._board is not None:
            self._board.begin()
        self.is_in_fit = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Remember the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Observe, if it is time to."""
        last = self._step
        self._step = self._before + batch + 1  # Several with `steps_per_execution`.
        every = self._every_steps
        if every is not None and self._step // every > last // every:
            self._observe()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Observe, and add the figures to the logs."""
        self._before = self._step
        if self._every_steps is None:
            self._observe()
        if logs is not None and self.observations:
            logs.update(_scalars(self.observations[-1]))

    def on_train_end(self, logs: Any = None) -> None:
        """Write what TensorBoard does not have yet."""
        self.is_in_fit = False
        if self._board is not None:
            start = time.perf_counter()
            self._board.end()
            self.seconds += time.perf_counter() - start

    def _observe(self) -> None:
        start = time.perf_counter()
        if _backend.name() == "jax":
            self.model.jax_state_sync()
        mixtures = telemetry.observe(self.model, self._x)
        self._layers = {mixture.name: mixture.layer for mixture in mixtures}
        seen: dict[str, Any] = {
            "epoch": self._epoch,
            "step": self._step,
            "mixtures": {
                mixture.name: {
                    "gates": mixture.gates,
                    "top_k": mixture.top_k,
                    **telemetry.summarise(mixture),
                }
                for mixture in mixtures
            },
        }
        cosines = self._conflict_of_tasks()
        if cosines is not None:
            seen["gradient_cosines"] = cosines
            seen["tasks"] = tuple(map(str, self.model.tasks))
        self.observations.append(seen)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(seen)) + "\n")
        if self._board is not None:
            self._board.write(seen, _scalars(seen), mixtures)
        self.seconds += time.perf_counter() - start

    def _conflict_of_tasks(self) -> np.ndarray | None:
        if self._conflict is None:
            return None
        return self._conflict(self._x, self._y, self._sample_weight)


def _steps_so_far(optimizer: Any) -> int:
    """Return the batches that a model was trained on in earlier calls of `fit`."""
    if optimizer is None:
        return 0
    batches = optimizer.gradient_accumulation_steps or 1
    return int(keras.ops.convert_to_numpy(optimizer.iterations)) * batches


def _scalars(seen: dict[str, Any]) -> dict[str, float]:
    """Return the figures for the logs, which are single numbers."""
    found: dict[str, float] = {}
    for name, figures in seen["mixtures"].items():
        prefix = name.replace("/", "_")
        shown = {
            "load_cv": figures["load_cv"],
            "least_used": figures["relative_usage"].min(),
            "largest_weight": figures["largest_weight"].mean(),
            "entropy": _mean(figures["entropy"][~np.isnan(figures["entropy"])]),
            "dropped": figures["dropped"] if figures["gates"] == ("router",) else None,
            "zero_activations": _mean(figures["zero_activations"]),
            "output_similarity": _mean_of_pairs(figures["output_similarity"]),
        }
        for figure, value in shown.items():
            is_left_out = figure == "load_cv" and not figures["readable"].all()
            if value is not None and not is_left_out:
                found[f"{prefix}_{figure}"] = float(value)
    cosines = seen.get("gradient_cosines")
    if cosines is not None:
        pairs = cosines[~np.eye(len(cosines), dtype=bool)]
        if not np.isnan(pairs).all():
            found["lowest_gradient_cosine"] = float(np.nanmin(pairs))
    return found


def _mean(values: Any) -> float | None:
    return None if values is None or not len(values) else float(np.mean(values))


def _mean_of_pairs(similarity: Any) -> float | None:
    if similarity is None or len(similarity) < 2:
        return None
    return float(similarity[~np.eye(len(similarity), dtype=bool)].mean())


def _plain(value: Any) -> Any:
    """Return what JSON has: lists, and None for NaN."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if np.isfinite(value) else None
    if isinstance(value, np.bool_):
        return bool(value)
    return int(value) if isinstance(value, np.integer) else value
