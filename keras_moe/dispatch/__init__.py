"""Dispatch: move tokens to their experts, and combine the expert outputs.

Axis letters: n tokens, d input features, u expert output units, e experts, k choices
per token, c capacity (slots per expert), m = n * k rows.

Every dispatch maps tokens (n, d) to outputs (n, u), and all give the same outputs if no
choice is dropped. They differ in the number of computed rows and in the requirements on
experts and compilers: see `TABLE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from keras_moe import _backend
from keras_moe.dispatch._blocked import (
    block_sizes,
    blocked,
    blocked_in_turn,
    rows_multiplied,
)
from keras_moe.dispatch._capacity import (
    capacity,
    slots_within_capacity,
    within_capacity,
)
from keras_moe.dispatch._dense import dense
from keras_moe.dispatch._devices import on_devices
from keras_moe.dispatch._even import blocked_evenly
from keras_moe.dispatch._expert_choice import expert_choice
from keras_moe.dispatch._ragged import ragged
from keras_moe.dispatch._rows import nan_where
from keras_moe.dispatch._split import split

__all__ = [
    "DROPLESS",
    "KNOWN",
    "SERVED",
    "TABLE",
    "Dispatch",
    "block_sizes",
    "blocked",
    "blocked_evenly",
    "blocked_in_turn",
    "capacity",
    "check_serves",
    "dense",
    "dropless_here",
    "expert_choice",
    "nan_where",
    "on_devices",
    "ragged",
    "rows_multiplied",
    "slots_within_capacity",
    "split",
    "substitutes",
    "within_capacity",
]


class Dispatch(NamedTuple):
    """Cost and requirements of a dispatch.

    Attributes:
        rows: number of rows that the experts compute.
        choices: supported values of a router's `choice`.
        experts_need: the method of the experts that it calls.
        dropless: whether it computes exactly the chosen rows, without drops. For a
            `Routing` without combine weights it returns the output of each choice,
            (n, k, u).
        under_xla: whether XLA can compile it.
        backends: supported Keras backends.
        in_exports: by export format, the dispatch that replaces it.
    """

    rows: str
    choices: tuple[str, ...]
    experts_need: str
    dropless: bool = False
    under_xla: bool = True
    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")
    in_exports: Mapping[str, str] = {}


TABLE = {
    "dense": Dispatch(
        rows="n * e: every expert on every token",
        choices=("token", "expert", "all"),
        experts_need="__call__",
    ),
    "capacity": Dispatch(
        rows="e * c: all slots, filled or empty",
        choices=("token", "expert"),
        experts_need="on_slots",
    ),
    "split": Dispatch(
        rows="m: one piece per expert",
        choices=("token",),
        experts_need="on_pieces",
        dropless=True,
        under_xla=False,  # The sizes of the pieces are data-dependent.
    ),
    "blocked": Dispatch(
        rows="m, plus the padding of each expert's last block",
        choices=("token",),
        experts_need="on_rows",
        dropless=True,
        # ONNX and OpenVINO cannot update slices of a tensor in a loop.
        in_exports={"onnx": "split", "openvino": "split"},
    ),
    "ragged": Dispatch(
        rows="m, plus padding: grouped matmuls on a TPU, else blocks",
        choices=("token",),
        experts_need="on_rows",
        dropless=True,
        backends=("jax",),
    ),
}
DROPLESS = tuple(name for name, row in TABLE.items() if row.dropless)
KNOWN = ("auto", *TABLE)
# By the `choice` of a router.
SERVED = {
    choice: tuple(name for name, row in TABLE.items() if choice in row.choices)
    for choice in ("token", "expert", "all")
}


def substitutes(format: str) -> dict[str, str]:
    """Return the replacement of each dispatch that `format` does not support.

    >>> from keras_moe.dispatch import substitutes
    >>> substitutes("onnx"), substitutes("tf_saved_model")
    ({'blocked': 'split'}, {})
    """
    return {
        name: row.in_exports[format]
        for name, row in TABLE.items()
        if format in row.in_exports
    }


def check_serves(dispatch: str, experts: Any) -> None:
    """Raise ValueError if `dispatch` does not support the experts or the backend."""
    if dispatch == "auto":
        return
    row = TABLE[dispatch]
    if not hasattr(experts, row.experts_need):
        fitting = [n for n, row in TABLE.items() if hasattr(experts, row.experts_need)]
        raise ValueError(
            f"`dispatch` must not be {dispatch!r} for the experts "
            f"{type(experts).__name__}, which have no method `{row.experts_need}`. "
            f"They support {['auto', *fitting]}."
        )
    if keras.backend.backend() not in row.backends:
        raise ValueError(
            f"`dispatch` may be {dispatch!r} only on the backends {row.backends}. "
            f"Received: dispatch={dispatch!r} on {keras.backend.backend()}"
        )


def dropless_here(experts: Any) -> str:
    """Return the dispatch that "auto" selects for the graph that is being traced."""
    if not _backend.under_xla():
        return "split" if hasattr(experts, TABLE["split"].experts_need) else "dense"
    if not hasattr(experts, TABLE["blocked"].experts_need):
        return "dense"
    if _backend.name() != "jax" or _backend.default_device_is_gpu():
        return "blocked"
    return "ragged"
