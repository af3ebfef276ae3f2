"""Initializers for stacked kernels: per-expert, with correct fan-in and fan-out.

Axis letters: e experts.

A stacked kernel has the shape (e, in, out). Keras computes the fans of a
variance-scaling initializer from the whole shape and counts e as part of the receptive
field, which makes the initial weights too small by a factor of sqrt(e).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks


def independent(initializer: Any, *key: int) -> Callable[..., Any]:
    """Return a copy of `initializer` with a seed derived from its seed and `key`.

    A seeded Keras initializer returns the same values on every call, which would give
    several kernels identical values. A copy of an unseeded initializer has a new random
    seed. An initializer without randomness is returned unchanged.
    """
    words = [_checks.count("key", word) for word in key]
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if "seed" not in config:
        return initializer
    if isinstance(config["seed"], int):
        # A SeedSequence distinguishes (seed 0, key 1) from (1, 0), but ignores trailing
        # zeros, hence the length of the key at the end.
        words = [config["seed"] % 2**64, *words, len(words) + 1]
        state = np.random.SeedSequence(words).generate_state(1)
        config["seed"] = int(state[0] >> 1)
    elif config["seed"] is not None:
        return initializer  # A SeedGenerator: every draw advances it.
    return type(initializer).from_config(config)


def is_seeded(initializer: Any) -> bool:
    """Return whether `initializer` returns the same values on every call."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return False
    return isinstance(initializer.get_config().get("seed"), int)


@keras.saving.register_keras_serializable("keras_moe")
class PerExpert(keras.initializers.Initializer):
    """Per-expert initialization of a stacked kernel with correct fan-in and fan-out.

    Each slice of the first axis is initialized by its own copy of `initializer`:
    experts get different values even with a fixed seed, and the distribution is that of
    a single layer.

    Args:
        initializer: a Keras initializer, its name, its config, or a function of
            `(shape, dtype)`. It initializes one expert.
        stream: int or sequence of ints, distinguishes kernels that share one seeded
            initializer: with the same seed, different streams give different values.

    Example:

    >>> kernel = keras_moe.initializers.PerExpert("glorot_uniform")((4, 16, 8))
    >>> kernel.shape == (4, 16, 8)
    True
    """

    def __init__(self, initializer: Any, stream: int | Sequence[int] = 0) -> None:
        if initializer is None:
            raise ValueError("`initializer` must not be None.")
        self.initializer = _checks.initializer("initializer", initializer)
        self.stream: int | list[int] = (
            _checks.count("stream", stream)
            if isinstance(stream, numbers.Integral)
            else [
                _checks.count(f"stream[{i}]", key)
                for i, key in enumerate(
                    _checks.items("stream", stream, "an integer or a sequence of them")
                )
            ]
        )

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Return a tensor of `shape`, whose first axis is the experts."""
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
