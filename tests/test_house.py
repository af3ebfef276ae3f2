"""The order of the house: imports point down, the surface is what it says."""

import ast
from pathlib import Path

import pytest

import keras_moe

ROOT = Path(keras_moe.__file__).parent
LEVELS = {
    "_backend": 0,
    "_checks": 0,
    "_layer": 0,
    "_requests": 0,
    "_version": 0,
    "initializers": 1,
    "routing": 1,
    "dispatch": 2,
    "experts": 2,
    "losses": 2,
    "routers": 2,
    "metrics": 3,
    "layers": 4,
    "multitask": 5,
    "export": 6,
    "plots": 6,
    "tfrs": 6,
    "upcycling": 6,
}
FILES = sorted(
    p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem != "__init__"
)


def _room(module: str) -> str:
    return module.removeprefix("keras_moe.").split(".")[0]


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module == "keras_moe":
                found += [f"keras_moe.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
    return [name for name in found if name.startswith("keras_moe.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    relative = path.relative_to(ROOT).with_suffix("")
    room = relative.parts[0]
    assert room in LEVELS, f"{room} has no level in this test"
    for name in _imports(path):
        other = _room(name)
        assert other == room or LEVELS[other] < LEVELS[room], f"{room} -> {name}"


def test_the_library_knows_no_example_and_no_test():
    for path in FILES:
        text = path.read_text()
        assert "recsys_examples" not in text
        assert "import tests" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_first_lines_say_what_room_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_names_exist():
    for module in (keras_moe, keras_moe.layers, keras_moe.multitask):
        for name in module.__all__:
            assert hasattr(module, name)
