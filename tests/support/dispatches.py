"""Every dispatch of the backend in use, by name, and by code path where it has several.

"blocked" computes its blocks in turn on a CPU and at once on an accelerator: `chosen`
selects one of them, whatever the device.
"""

import contextlib

import keras
import pytest

from keras_moe import _backend
from keras_moe.dispatch import TABLE, _blocked

BACKEND = keras.backend.backend()

DROPLESS = ["in_turn", "at_once", "ragged" if BACKEND == "jax" else "split"]
TOKEN_CHOICE = ["dense", "capacity", *DROPLESS]
EXPERT_CHOICE = ["dense", "capacity"]
# LayerExperts have no kernels that could be multiplied together.
UNSTACKED = [way for way in TOKEN_CHOICE if way in ("dense", "capacity", "split")]


def dispatch_of(way):
    """The argument `dispatch` of a layer that is to go this way."""
    names = {"in_turn": "blocked", "at_once": "blocked", "dropping": "capacity"}
    return names.get(way, way)


# What XLA compiles.
COMPILED = [way for way in TOKEN_CHOICE if TABLE[dispatch_of(way)].under_xla]


@contextlib.contextmanager
def chosen(way, block_rows=4, tail_rows=2):
    """The device that goes this way, with blocks that small inputs fill too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "on_accelerator", lambda: way == "at_once")
        sizes = tuple(range(tail_rows, block_rows + 1, tail_rows))
        patch.setattr(_blocked, "block_sizes", lambda *_: sizes)
        yield
