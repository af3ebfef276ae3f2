"""Loads SavedModels, and finds damage that TensorFlow does not.

TensorFlow verifies the variables alone: a flipped bit in `saved_model.pb`, which holds
constants, or in the vocabulary of a lookup table would change outputs.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from keras_moe._files import atomic_write

# In the format of `sha256sum -c`. TensorFlow and its servers ignore other files here.
CHECKSUMS = "assets.extra/sha256sums.txt"
_NAMES = ("saved_model.pb", "saved_model.pbtxt", "saved_model.cpb")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
_REMEDY = "export the model again, or copy it again from where it is whole"


def write_checksums(folder: str | Path) -> None:
    """Write the checksums of a SavedModel's files, which `load` verifies.

    `export_model` and `export_saved_model` call it. Call it for a SavedModel that Keras
    or TensorFlow wrote, and again after its files were changed. The command `sha256sum
    -c assets.extra/sha256sums.txt` in its folder verifies them too. The variables have
    checksums of TensorFlow and are not listed.

    Args:
        folder: the folder of a SavedModel.

    Raises:
        ValueError: if there is no SavedModel.
        OSError: if a file cannot be read or written.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.export(f"{folder}/1", verbose=False)
    ...     keras_moe.export.write_checksums(f"{folder}/1")
    ...     loaded = keras_moe.export.load_saved_model(f"{folder}/1")
    """
    path = os.fspath(folder)
    try:
        _check_exists(path)
        lines = [f"{_sum(f'{path}/{name}')}  {name}\n" for name in _files(path)]
        _replace(f"{path}/{CHECKSUMS}", "".join(lines))
    except (_DamageError, OSError):
        raise
    except Exception as error:  # TensorFlow's errors of files
        reason = str(error).strip().splitlines() or [repr(error)]
        raise OSError(
            f"the checksums of {path} cannot be written. TensorFlow says: "
            f"{type(error).__name__}: {reason[0][:300]}"
        ) from error


def _replace(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    import tensorflow as tf

    if "://" not in path:
        with atomic_write(path, overwrite=True) as unfinished:
            unfinished.write_text(text)
        return
    # Stores of objects show a file when it is closed.
    tf.io.gfile.makedirs(os.path.dirname(path))
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(text)


def load_saved_model(path: str | Path) -> Any:
    """Return `tf.saved_model.load(path)`, after its checksums if it has any.

    Args:
        path: the folder of a SavedModel.

    Raises:
        ValueError: if it is missing, incomplete, damaged, or not a SavedModel. The
            message names the path. Without checksums (see `write_checksums`), a flipped
            bit in `saved_model.pb` may go unnoticed.
    """
    import tensorflow as tf

    folder = os.fspath(path)
    try:
        _check_exists(folder)
        _check_sums(folder)
        return tf.saved_model.load(folder)
    except _DamageError:
        raise
    except Exception as error:  # OpError, IndexError, KeyError, DecodeError, and others
        lines = str(error).strip().splitlines()
        reason = lines[0][:300] if lines else repr(error)
        raise _DamageError(
            f"{folder} cannot be loaded: a file is damaged, missing or unreadable, or "
            f"this TensorFlow has not all of its operations; {_REMEDY}. TensorFlow "
            f"says: {type(error).__name__}: {reason}"
        ) from error


class _DamageError(ValueError):
    """The one error of `load_saved_model`."""


def _check_exists(folder: str) -> None:
    import tensorflow as tf

    if not tf.io.gfile.exists(folder):
        raise _DamageError(f"{folder} does not exist, or may not be read")
    if not tf.io.gfile.isdir(folder):
        raise _DamageError(f"{folder} must be the folder of a SavedModel; it is a file")
    for name in _NAMES:
        file = f"{folder}/{name}"
        if tf.io.gfile.exists(file) and not tf.io.gfile.isdir(file):
            return
    raise _DamageError(f"{folder} is not a SavedModel: it has no file saved_model.pb")


def _check_sums(folder: str) -> None:
    import tensorflow as tf

    path = f"{folder}/{CHECKSUMS}"
    if not tf.io.gfile.exists(path):
        return
    with tf.io.gfile.GFile(path, "rb") as file:
        lines = file.read().decode(errors="replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    expected = {match[2]: match[1] for match in matches if match}
    present = _files(folder)
    for name in present:
        if name not in expected or None in matches:
            raise _DamageError(
                f"{path} is damaged, or not of this SavedModel; {_REMEDY}"
            )
        if _sum(f"{folder}/{name}") != expected[name]:
            raise _DamageError(
                f"{folder}/{name} is damaged, or was changed after its checksum was "
                f"written; {_REMEDY}. If the change was meant, call "
                "keras_moe.export.write_checksums"
            )
    for name in expected.keys() - {*present}:
        raise _DamageError(f"{folder}/{name} is missing; {_REMEDY}")


def _files(folder: str) -> list[str]:
    """Return the files of a SavedModel that are its own, but for the variables."""
    import tensorflow as tf

    found = []
    for name in (*_NAMES, "fingerprint.pb", "variables/variables.index"):
        if tf.io.gfile.exists(f"{folder}/{name}"):
            found.append(name)
    for parent, _, names in tf.io.gfile.walk(f"{folder}/assets"):
        inside = os.path.relpath(parent, folder)
        found += [f"{inside}/{name}" for name in names]
    return sorted(found)


def _sum(path: str) -> str:
    import tensorflow as tf

    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
