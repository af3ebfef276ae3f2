"""`keras_moe._files`, the atomic writes, without the import of Keras.

A command reports an error in its data or folders before that import, of seconds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_moe import _files
else:

    def _load() -> Any:
        package = importlib.util.find_spec("keras_moe")
        path = Path(package.origin).with_name("_files.py")
        spec = importlib.util.spec_from_file_location("keras_moe_files", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    _files = _load()

disk_error = _files.disk_error
atomic_write = _files.atomic_write
flush = _files.flush
flush_entries = _files.flush_entries
hidden_folder = _files.hidden_folder
make_folder = _files.make_folder
move = _files.move
remove_empty = _files.remove_empty
try_lock = _files.try_lock
