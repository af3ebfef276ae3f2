"""Atomic writes and names of files, of `keras_moe`, without the import of Keras.

A command reports an error in its data or folders before that import, of seconds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_moe import _files
    from keras_moe.report import _names
else:

    def _load(file: str) -> Any:
        package = importlib.util.find_spec("keras_moe")
        path = Path(package.origin).parent / file
        name = f"keras_moe_{path.stem.strip('_')}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    _files = _load("_files.py")
    _names = _load("report/_names.py")

disk_error = _files.disk_error
atomic_write = _files.atomic_write
flush = _files.flush
flush_entries = _files.flush_entries
hidden_folder = _files.hidden_folder
make_folder = _files.make_folder
move = _files.move
remove_empty = _files.remove_empty
try_lock = _files.try_lock

# In the folder of a run: results and settings, observations of experts, the page.
RECORD, EXPERTS, PAGE = _names.RECORD, _names.EXPERTS, _names.PAGE
