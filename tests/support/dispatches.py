"""Every dispatch of the backend in use, by name, and by code path where it has several.

"blocked" computes its blocks in turn on a CPU and evenly on an accelerator: `chosen`
selects one of them, whatever the device.
"""

import contextlib

import keras
import pytest

from keras_moe import _backend
from keras_moe.dispatch import TABLE, _blocked, _even

BACKEND = keras.backend.backend()

DROPLESS = ["in_turn", "evenly", "ragged" if BACKEND == "jax" else "split"]
TOKEN_CHOICE = ["dense", "capacity", *DROPLESS]
EXPERT_CHOICE = ["dense", "capacity"]
# LayerExperts have no kernels that could be multiplied together.
UNSTACKED = [way for way in TOKEN_CHOICE if way in ("dense", "capacity", "split")]


def dispatch_of(way):
    """The argument `dispatch` of a layer that is to go this way."""
    names = {"in_turn": "blocked", "evenly": "blocked", "dropping": "capacity"}
    return names.get(way, way)


# What XLA compiles.
COMPILED = [way for way in TOKEN_CHOICE if TABLE[dispatch_of(way)].under_xla]


@contextlib.contextmanager
def chosen(way, block_rows=4, tail_rows=2):
    """The device that goes this way, with blocks that small inputs fill too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "on_accelerator", lambda: way == "evenly")
        sizes = tuple(range(tail_rows, block_rows + 1, tail_rows))
        patch.setattr(_blocked, "block_sizes", lambda *_: sizes)
        # Few slots, so that many rows overflow; it needs `block_rows` slots.
        patch.setattr(_even, "rows_per_turn", lambda *_: block_rows)
        patch.setattr(
            _even, "slots_per_expert", lambda m, e, b: m // e + 1 + -(-b // e)
        )
        yield
