"""Docstrings, which are written in Markdown, as the reStructuredText of autodoc."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import keras
from pages import MODULES, public_names
from sphinx.util.inspect import stringify_signature

_LINK = re.compile(r"\[([^\]\[]+)\]\(\s*([^)\s]+)\s*\)")
# A colon, an empty line, and code that is indented.
_INDENTED_CODE = re.compile(r"(?<=\w):(?=\n\n    \S)")
_EXAMPLE = re.compile(r"^(Examples?):$(?=\n\n\S)", re.MULTILINE)
_RETURNS = re.compile(r"(?<=^Returns:\n)(?:[ ]+.*\n|\n)+", re.MULTILINE)
_COLON = "\N{RATIO}"
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# Keras says what these methods of a layer, a model or a metric do.
_OF_KERAS = {
    "build",
    "call",
    "compute_mask",
    "compute_output_shape",
    "compute_output_spec",
    "get_config",
    "variables",
}
# Members without an underscore that are for subclasses within the package.
_INTERNAL = {"kind", "least_rank", "make_experts", "num_gates"}


def setup(app: Any) -> dict[str, bool]:
    """Connect to autodoc, before napoleon."""
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}


def _before_napoleon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    text = converted("\n".join(lines))
    if what in ("attribute", "property"):
        text = text.replace(":", _COLON)
    lines[:] = text.split("\n")


def _after_napoleon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def converted(text: str) -> str:
    """Return a docstring with the links and the code of reStructuredText."""
    # Napoleon takes what stands before a colon for a type.
    text = _RETURNS.sub(lambda found: found.group().replace(": ", f"{_COLON} "), text)
    text = _EXAMPLE.sub(r".. rubric:: \1", text)
    text = _INDENTED_CODE.sub("::", text)
    text = _LINK.sub(_link, text)
    return _CODE.sub(_code, text)


def _link(found: re.Match[str]) -> str:
    return f"`{found.group(1)} <{found.group(2)}>`__"


def _code(found: re.Match[str]) -> str:
    text = found.group(1)
    if re.search(r" <\S+>$", text):
        return found.group()  # A link.
    if _has_an_entry(text):
        return f":py:obj:`{text}`"
    return f"``{text}``"


def _has_an_entry(name: str) -> bool:
    module, _, rest = name.removeprefix("keras_moe.").partition(".")
    if not name.startswith("keras_moe.") or module not in MODULES:
        return False
    if not rest:
        return True
    found = importlib.import_module(f"keras_moe.{module}")
    return rest in public_names(found) and _is_code(getattr(found, rest))


def _is_code(thing: Any) -> bool:
    return inspect.isclass(thing) or inspect.isroutine(thing)


def _signature(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str, str | None] | None:
    """Return the arguments of `__init__`: the `__new__` of Keras hides them."""
    if what != "class" or not issubclass(obj, keras.Operation | keras.metrics.Metric):
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    found = inspect.Signature(parameters)
    return stringify_signature(found, show_annotation=False), returned


def _skip(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    if name in _OF_KERAS | _INTERNAL or type(obj).__name__ == "_tuplegetter":
        return True
    # A module's public names that are no classes or functions stand in its text.
    if what == "module" and not _is_code(obj):
        return True
    return None
