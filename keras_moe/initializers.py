"""Initial values for stacked kernels: an independent draw for every expert.

Axis letters: e experts.

A stacked kernel has the shape (e, in, out). Keras computes the fans of a
variance-scaling initializer from the whole shape and would count e as a part of the
receptive field, so that every expert starts sqrt(e) too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


def independent(initializer: Any, *key: int) -> Callable[..., Any]:
    """Return a copy of `initializer` whose draws differ for every `key`.

    A seeded Keras initializer gives the same values each time, so one that serves
    several kernels would start them alike. An unseeded one draws a new seed here,
    and one without randomness is returned as it is.
    """
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if "seed" not in config:
        return initializer
    if isinstance(config["seed"], int):
        # A SeedSequence keeps neighbours apart: (seed 0, key 1) is not (1, 0). It takes
        # zeros at the end for nothing, so the end is the length of the key.
        words = [config["seed"], *key, len(key) + 1]
        state = np.random.SeedSequence(words).generate_state(1)
        config["seed"] = int(state[0] >> 1)
    elif config["seed"] is not None:
        return initializer  # A SeedGenerator: every draw already moves it on.
    return type(initializer).from_config(config)


def is_seeded(initializer: Any) -> bool:
    """Return whether `initializer` draws the same values each time."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return False
    return isinstance(initializer.get_config().get("seed"), int)


@keras.saving.register_keras_serializable("keras_moe")
class PerExpert(keras.initializers.Initializer):
    """Draws every expert of a stacked kernel on its own, with its true fans.

    Each slice of the first axis is drawn by its own copy of `initializer`, so no two
    experts start alike even where `initializer` carries a fixed seed, and every
    expert starts as the single layer would.

    Args:
        initializer: a Keras initializer, its name, its config, or a function of
            `(shape, dtype)`. It draws one expert.
        stream: int or sequence of ints, distinguishes kernels that share one seeded
            initializer. Two `PerExpert` of the same seed and another `stream` draw
            other values.

    Example:

    >>> kernel = keras_moe.initializers.PerExpert("glorot_uniform")((4, 16, 8))
    >>> kernel.shape == (4, 16, 8)
    True
    """

    def __init__(self, initializer: Any, stream: int | Sequence[int] = 0) -> None:
        self.initializer = keras.initializers.get(initializer)
        if self.initializer is None:
            raise ValueError("`initializer` must not be None.")
        self.stream = stream if isinstance(stream, int) else list(stream)

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Returns a tensor of `shape`, whose first axis is the experts."""
        num_experts, *expert_shape = shape
        stream = [self.stream] if isinstance(self.stream, int) else self.stream
        draws = [
            independent(self.initializer, *stream, k)(expert_shape, dtype=dtype)
            for k in range(num_experts)
        ]
        return ops.stack(draws, axis=0)

    def get_config(self) -> dict[str, Any]:
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "stream": self.stream,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PerExpert:
        return cls(**config)
