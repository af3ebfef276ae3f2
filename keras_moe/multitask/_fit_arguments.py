"""Labels and sample weights as the user gives them to `fit` and `evaluate`."""

from __future__ import annotations

import inspect
from typing import Any

import keras


class FitArguments(keras.Model):
    """A model that completes the sample weights before Keras sees them."""

    def complete_weights(self, y: Any, sample_weight: Any) -> Any:
        """Return the sample weights, completed; check the labels."""
        raise NotImplementedError

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        return super().fit(**self._complete(super().fit, args, kwargs))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return super().evaluate(**self._complete(super().evaluate, args, kwargs))

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().train_on_batch(
            **self._complete(super().train_on_batch, args, kwargs)
        )

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().test_on_batch(
            **self._complete(super().test_on_batch, args, kwargs)
        )

    def _complete(
        self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments by name, with missing sample weights set to 1.

        Keras requires a weight for every label before it calls `compute_loss`.
        """
        arguments = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        weight = self.complete_weights(
            arguments.get("y"), arguments.get("sample_weight")
        )
        if weight is not None:
            arguments["sample_weight"] = weight
        held_out = arguments.get("validation_data")
        if isinstance(held_out, list | tuple) and len(held_out) in (2, 3):
            x, y, *weights = held_out
            weight = self.complete_weights(y, weights[0] if weights else None)
            arguments["validation_data"] = (x, y, *([weight] if weights else []))
        return arguments
