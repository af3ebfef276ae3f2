"""Guard against values that are not finite: in inputs, gradients and weights."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _backend, _checks
from keras_moe.callbacks import _guarded_step

_ACTIONS = ("stop", "skip")


class FiniteGuard(keras.callbacks.Callback):
    """Applies no batch whose inputs or gradients are infinite or NaN.

    One such value in a batch reaches every weight, often while the reported loss stays
    finite (with ReLUs, or routers that drop the row), so that
    `keras.callbacks.TerminateOnNaN` does not see it. This callback checks the features
    and the gradients of each batch on the device, before the optimizer has them. A
    batch with a value that is not finite changes nothing: not weights, optimizer,
    averages of routers and normalizations, or metrics. The message names the batch, the
    feature and its row, or the weights, with the expert or the row of a table.

    It replaces `train_step` of the model and `apply` of its optimizer during `fit`; if
    `fit` is interrupted, until the next `fit` with a guard, or `remove()`. Under
    `keras.optimizers.LossScaleOptimizer`, which handles gradients that are not finite
    itself, only features are checked.

    Args:
        action: what to do with such a batch:

            - "stop": raise FloatingPointError. The model is as before the batch.
            - "skip": go on with the next batch. The logs of an epoch have their number,
              `skipped_batches`.
        max_in_a_row: int, with "skip": after so many batches in a row,
            FloatingPointError is raised. The weights themselves may be the reason.

    Raises:
        ValueError: if an argument is invalid, or under a `tf.distribute` strategy.
        FloatingPointError: in `fit`, see above, and at the end of an epoch if a weight
            is not finite.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.array([[1.0, 2.0], [3.0, np.inf], [5.0, 6.0], [7.0, 8.0]])
    >>> guard = keras_moe.callbacks.FiniteGuard()
    >>> try:
    ...     history = model.fit(x, x[:, :1], 2, callbacks=[guard], verbose=0)
    ... except FloatingPointError as error:
    ...     "feature 'inputs' is not finite in row" in str(error)
    True
    """

    def __init__(self, action: str = "stop", max_in_a_row: int = 10) -> None:
        super().__init__()
        self.action = _checks.one_of("action", action, _ACTIONS)
        self.max_in_a_row = _checks.positive_int("max_in_a_row", max_in_a_row)
        self._read: Any = None
        self._is_in_fit = False

    def set_model(self, model: Any) -> None:
        """Guard the training step, before `fit` makes its train function."""
        super().set_model(model)
        if getattr(model, "optimizer", None) is None:
            return
        strategy = type(getattr(model, "distribute_strategy", None)).__name__
        if strategy not in ("NoneType", "_DefaultDistributionStrategy"):
            raise ValueError(
                "`FiniteGuard` works without a tf.distribute strategy, which reduces "
                f"gradients where no branch may be. Received: {strategy}"
            )
        self._findings = _guarded_step.Findings()
        self._read = _guarded_step.install(model, self._findings)

    def on_train_begin(self, logs: Any = None) -> None:
        """Start counting."""
        self._epoch = self._in_a_row = self._skipped = 0
        self._is_in_fit = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the count of an epoch."""
        self._epoch, self._skipped = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop, or count, if a batch was not applied."""
        self._read()
        new, self._findings.batches = self._findings.batches, 0
        self._skipped += new
        self._in_a_row = self._in_a_row + new if new else 0
        if not new:
            return
        steps = self.model.steps_per_execution
        first, last = batch + 2 - steps, batch + 1
        which = f"batch {last}" if steps == 1 else f"of batches {first} to {last}, one"
        message = f"epoch {self._epoch + 1}, {which}: {self._cause()}"
        if self.action == "stop":
            self._stop(f"{message}. The batch was not applied")
        if self._in_a_row >= self.max_in_a_row:
            self._stop(f"{message}. {self._in_a_row} batches in a row were skipped")
        if self._skipped == new:
            warnings.warn(f"{message}. The batch is skipped", stacklevel=2)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Report the number of skipped batches; check all weights."""
        if self.action == "skip" and logs is not None:
            logs["skipped_batches"] = self._skipped
        broken = self._broken_weights()
        if broken:
            self._stop(f"epoch {epoch + 1}: {broken}")

    def on_train_end(self, logs: Any = None) -> None:
        """Give the model its training step back."""
        self.remove()

    def on_test_end(self, logs: Any = None) -> None:
        """Give the model its training step back, if it was `evaluate` alone."""
        if not self._is_in_fit:
            self.remove()

    def on_predict_end(self, logs: Any = None) -> None:
        """Give the model its training step back."""
        self.on_test_end()

    def remove(self) -> None:
        """Give the model its training step back."""
        self._is_in_fit = False
        if self._read is not None:
            _guarded_step.remove(self.model)
            self._read = None

    def _stop(self, message: str) -> None:
        self.remove()
        raise FloatingPointError(message)

    def _cause(self) -> str:
        if self._findings.rows:
            rows = [
                f"feature {name!r} is not finite in row {row} of the batch"
                for name, row in self._findings.rows.items()
            ]
            return "; ".join(rows)
        broken = self._broken_weights()
        if broken:
            return broken
        variables = self.model.trainable_variables
        found = [
            (variable, index)
            for variable, index in zip(variables, self._findings.indices, strict=True)
            if index >= 0
        ]
        variable, index = found[-1]  # nearest to the loss
        largest = max(
            (float(ops.convert_to_numpy(ops.max(ops.abs(v)))), v.path)
            for v in variables
            if 0 not in v.shape
        )
        return (
            f"the gradient of {_named(variable, index)} is not finite (with "
            f"{len(found) - 1} more of {len(variables)}), while features and weights "
            f"are: look at labels, sample weights and the learning rate. The largest "
            f"weight is {largest[0]:.3g}, of {largest[1]}"
        )

    def _broken_weights(self) -> str:
        if _backend.name() == "jax":
            self.model.jax_state_sync()
        for variable in self.model.weights:
            if "float" not in keras.backend.standardize_dtype(variable.dtype):
                continue
            if not bool(ops.all(ops.isfinite(variable))):
                values = ops.convert_to_numpy(ops.isfinite(variable))
                bad = ~values.reshape((len(values) if values.ndim else 1, -1))
                index = int(np.argmax(bad.any(-1)))
                return f"the weight {_named(variable, index)} is not finite"
        return ""


def _named(variable: Any, index: int) -> str:
    """Return the path of a variable, with the expert or the row of a table."""
    if variable.path.endswith("embeddings"):
        return f"{variable.path}, row {index},"
    if "expert" in variable.path and len(variable.shape) > 1:
        return f"{variable.path}, expert {index},"
    return variable.path
