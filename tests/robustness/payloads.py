"""Configs that would run code, read or write a file, if a loader obeyed them.

Each is a function of a `Target`, the marks that it would leave.
"""

from __future__ import annotations

import base64
import marshal
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = "the-content-of-a-private-file"


@dataclass(frozen=True)
class Target:
    """A folder that stays as it is: no `canary` in it, `secret.txt` unread."""

    folder: Path

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def secret(self) -> Path:
        return self.folder / "secret.txt"

    @property
    def command(self) -> str:
        return f"touch {self.canary}"


class _Reduced:
    """Its pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def _pickled(target: Target) -> bytes:
    return pickle.dumps(_Reduced(target.command))


def _code(target: Target) -> str:
    source = f"lambda *a, **k: __import__('os').system({target.command!r})"
    code = compile(source, "config", "eval").co_consts[0]
    return base64.b64encode(marshal.dumps(code)).decode()


def _object(
    module: Any, name: Any, config: Any, registered: Any = None
) -> dict[str, Any]:
    return {
        "module": module,
        "class_name": name,
        "config": config,
        "registered_name": registered,
    }


def _function(module: str, name: str, registered: Any = "function") -> dict[str, Any]:
    return _object(module, "function", name, registered)


def _lambda(target: Target) -> dict[str, Any]:
    value = [_code(target), None, None]
    return {"class_name": "__lambda__", "config": {"value": value}}


def _lambda_layer(target: Target, **more: Any) -> dict[str, Any]:
    config = {"name": "l", "function": _lambda(target), "arguments": {}, **more}
    return _object("keras.layers", "Lambda", config)


def _sequential(layer: dict[str, Any]) -> dict[str, Any]:
    return _object("keras", "Sequential", {"name": "s", "layers": [layer]})


Payload = Callable[[Target], Any]
PAYLOADS: dict[str, Payload] = {
    "os.system as a class": lambda t: _object("os", "system", {"command": t.command}),
    "posix.system as a class": lambda t: _object(
        "posix", "system", {"command": t.command}
    ),
    "os.system as a function": lambda t: _function("os", "system", "system"),
    "subprocess.Popen": lambda t: _object(
        "subprocess", "Popen", {"args": ["touch", str(t.canary)]}
    ),
    "builtins.eval as a class": lambda t: _object(
        "builtins", "eval", {"source": t.command}
    ),
    "builtins.eval as a function": lambda t: _function("builtins", "eval", "eval"),
    "builtins.exec as a function": lambda t: _function("builtins", "exec"),
    "builtins.open": lambda t: _object(
        "builtins", "open", {"file": str(t.canary), "mode": "w"}
    ),
    "pathlib.Path": lambda t: _object("pathlib", "Path", {"args": [str(t.canary)]}),
    "importlib.import_module": lambda t: _object(
        "importlib", "import_module", {"name": "os"}
    ),
    "Lambda layer": _lambda_layer,
    "Lambda layer that claims to be safe": lambda t: _lambda_layer(t, safe_mode=False),
    "Lambda in a Sequential": lambda t: _sequential(_lambda_layer(t)),
    "Lambda in a LayerExperts": lambda t: _object(
        "keras_moe.experts",
        "LayerExperts",
        {"layers": [_lambda_layer(t)]},
        "keras_moe>LayerExperts",
    ),
    "marshalled lambda": _lambda,
    "lambda as a function's config": lambda t: _object(
        "builtins", "function", _lambda(t), "function"
    ),
    "pickle in a TorchModuleWrapper": lambda t: _object(
        "keras.layers",
        "TorchModuleWrapper",
        {"name": "t", "module": base64.b64encode(_pickled(t)).decode()},
    ),
    "pickle as bytes": lambda t: {
        "class_name": "__bytes__",
        "config": {"value": _pickled(t).decode("latin1")},
    },
    "type spec of os": lambda t: {
        "class_name": "__typespec__",
        "spec_name": "system",
        "module": "os",
        "config": [t.command],
        "spec_config": [t.command],
        "registered_name": None,
    },
    "TFSMLayer": lambda t: _object(
        "keras.layers", "TFSMLayer", {"filepath": str(t.folder), "name": "t"}
    ),
    "get_file": lambda t: _object(
        "keras.utils",
        "get_file",
        {
            "fname": t.canary.name,
            "origin": t.secret.as_uri(),
            "cache_dir": str(t.folder),
            "cache_subdir": "",
        },
    ),
    "get_file as a function": lambda t: _function(
        "keras.utils", "get_file", "get_file"
    ),
    "get_file of keras.src": lambda t: _object(
        "keras.src.utils.file_utils", "get_file", {"origin": t.secret.as_uri()}
    ),
    "load_model": lambda t: _object(
        "keras.saving", "load_model", {"filepath": str(t.secret), "safe_mode": False}
    ),
    "unsafe mode": lambda t: _object(
        "keras.config", "enable_unsafe_deserialization", {}
    ),
    "unsafe mode of keras.src": lambda t: _object(
        "keras.src.saving.serialization_lib", "enable_unsafe_deserialization", {}
    ),
    "unsafe mode as a function": lambda t: _function(
        "keras.config", "enable_unsafe_deserialization"
    ),
    "os through keras.src": lambda t: _object(
        "keras.src.saving.saving_lib", "os", {"command": t.command}
    ),
    "a module of keras.src that is none": lambda t: _object(
        "keras.src.os", "system", {"command": t.command}
    ),
    "StackedRNNCells of a Lambda": lambda t: _object(
        "keras.layers", "StackedRNNCells", {"name": "r", "cells": [_lambda_layer(t)]}
    ),
    "vocabulary from a file": lambda t: _object(
        "keras.layers", "StringLookup", {"name": "v", "vocabulary": str(t.secret)}
    ),
    "vocabulary of numbers from a file": lambda t: _object(
        "keras.layers", "IntegerLookup", {"name": "v", "vocabulary": str(t.secret)}
    ),
    "TextVectorization from a file": lambda t: _object(
        "keras.layers", "TextVectorization", {"name": "v", "vocabulary": str(t.secret)}
    ),
    "a registered name of ours for os": lambda t: _object(
        "os", "system", {"command": t.command}, "keras_moe>system"
    ),
    "our export": lambda t: _object(
        "keras_moe.export", "load", {"path": str(t.folder)}
    ),
    "our module, another's function": lambda t: _object(
        "keras_moe.export._files", "shutil", {"path": str(t.folder)}
    ),
    "our initializer with a lambda": lambda t: _object(
        "keras_moe.initializers",
        "PerExpert",
        {"initializer": _lambda(t), "stream": 0},
        "keras_moe>PerExpert",
    ),
    "our MoE with a Lambda as its router": lambda t: _object(
        "keras_moe.layers",
        "MoE",
        {"num_experts": 2, "expert_units": [3], "router": _lambda_layer(t)},
        "keras_moe>MoE",
    ),
    "our task with a lambda": lambda t: _object(
        "keras_moe.multitask",
        "Task",
        {
            "name": "a",
            "head": "binary",
            "label": None,
            "defined": _lambda(t),
            "skip_missing": False,
            "loss": _lambda(t),
            "metrics": [_lambda(t)],
        },
        "keras_moe>Task",
    ),
    "a list": lambda t: [_lambda(t)],
    "a name with dots": lambda t: "os.system",
    "a path": lambda t: str(t.secret),
}


def _changed(slot: Any, **changes: Any) -> Any:
    return {**slot, **changes} if isinstance(slot, dict) else slot


# What is changed in a config that is there, and stays otherwise as it is.
CHANGES: dict[str, Callable[[Any, Target], Any]] = {
    "module os": lambda slot, t: _changed(slot, module="os"),
    "module os, system": lambda slot, t: _changed(
        slot, module="os", class_name="system", registered_name=None
    ),
    "no module, no registered name": lambda slot, t: _changed(
        slot, module=None, registered_name=None
    ),
    "registered name of another": lambda slot, t: _changed(
        slot, registered_name="keras_moe>Tower"
    ),
    "class name with a path": lambda slot, t: _changed(
        slot, class_name="../../os>system", registered_name="../../os>system"
    ),
    "compile config with a lambda": lambda slot, t: _changed(
        slot, compile_config={"optimizer": _lambda(t), "loss": _lambda(t)}
    ),
    "build config with a lambda": lambda slot, t: _changed(
        slot, build_config={"input_shape": _lambda(t), "adapted": {"0": _lambda(t)}}
    ),
    "build config that quantizes": lambda slot, t: _changed(
        slot,
        build_config={
            "input_shape": [None, 6],
            "adapted": {"0": {"quantize": {"mode": "int8", "config": _lambda(t)}}},
        },
    ),
}
