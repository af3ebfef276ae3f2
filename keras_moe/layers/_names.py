"""Layer names as people write them."""

from __future__ import annotations

import keras


def default_name(name: str) -> str:
    """Return "moe", "moe_1", ...: from the class name Keras would make "mo_e"."""
    count = keras.backend.get_uid(name)
    return name if count == 1 else f"{name}_{count - 1}"
