"""One state in one file: a zip of a JSON tree and its arrays, without pickles.

The zip has a checksum (CRC-32) of every entry, which is compared when it is read.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes  # of Keras: the names of bfloat16 and float8 for NumPy
import numpy as np

from keras_moe import _files

_TREE = "tree.json"
# What `zipfile`, `json` and NumPy raise for flipped bits, wherever they are.
_DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,  # and NotImplementedError
    zipfile.BadZipFile,
    zlib.error,
)


def write(path: Path, tree: Any) -> None:
    """Write a tree of plain values, bytes and arrays, whole or not at all.

    Raises:
        OSError: if the file cannot be written; one that was there stays.
        TypeError: if a value is of another kind.
    """
    with (
        _files.atomic_write(path, overwrite=True) as unfinished,
        zipfile.ZipFile(unfinished, "w") as archive,
    ):
        # Array by array: a table of many rows is in memory once.
        count = [0]

        def store(array: np.ndarray) -> dict[str, Any]:
            name = f"array-{count[0]}.npy"
            count[0] += 1
            with archive.open(name, "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, _portable(array), allow_pickle=False)
            return {"array": name, "dtype": array.dtype.name}

        encoded = _encode(tree, store)
        archive.writestr(_TREE, json.dumps(encoded))


class DamagedFileError(ValueError):
    """A file that is missing, damaged or of another kind."""


def read(path: Path) -> Any:
    """Return the tree of a file.

    Raises:
        DamagedFileError: if it is damaged or is none that `write` made.
    """
    try:
        with zipfile.ZipFile(path) as archive:

            def load(node: dict[str, Any]) -> np.ndarray:
                with archive.open(node["array"]) as entry:
                    # The checksum is compared at the end of an entry.
                    content = io.BytesIO(entry.read())
                array = np.lib.format.read_array(content, allow_pickle=False)
                return array.view(_dtype(node["dtype"]))

            return _decode(json.loads(archive.read(_TREE)), load)
    except _DAMAGE as error:
        raise DamagedFileError(f"{path}: not a whole backup: {error}") from error


def is_plain(value: Any) -> bool:
    """Whether `write` takes the value."""
    try:
        _encode(value, lambda array: {})
    except TypeError:
        return False
    return True


def _encode(value: Any, store: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcV":
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: store(np.asarray(value))}
    if isinstance(value, bytes):
        return {"bytes": store(np.frombuffer(value, "uint8"))}
    if type(value) is list or type(value) is tuple:
        return {type(value).__name__: [_encode(item, store) for item in value]}
    if type(value) is dict:  # a subclass may hold more
        pairs = [[_encode(k, store), _encode(v, store)] for k, v in value.items()]
        return {"dict": pairs}
    raise TypeError(f"a state must hold plain values and arrays. Received: {value!r}")


def _decode(node: Any, load: Any) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "array":
        return load(content)
    if kind == "scalar":
        return load(content)[()]
    if kind == "bytes":
        return load(content).tobytes()
    if kind == "dict":
        return {_decode(k, load): _decode(v, load) for k, v in content}
    items = [_decode(item, load) for item in content]
    return tuple(items) if kind == "tuple" else items


def _portable(array: np.ndarray) -> np.ndarray:
    # NumPy's format has no name for bfloat16.
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
