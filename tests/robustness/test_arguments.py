"""The arguments of every public class and function, 500 cases with a fixed seed."""

import inspect

import keras
import pytest

from tests.robustness import arguments, calls, constructors, functions, surface

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the checks are the same"
)


def test_every_public_constructor_has_strategies():
    for kind in constructors.constructors().values():
        constructors.arguments_of(kind)
        assert constructors.judge(kind, {}) == "works", kind


def test_every_public_function_is_fuzzed():
    found = surface.public()
    missing = [
        name
        for name, thing in found.items()
        if not inspect.isclass(thing) and name not in functions.FUNCTIONS
    ]
    assert not missing, (
        f"without a strategy in tests/robustness/functions.py: {missing}"
    )
    assert len(found) > 80


def test_every_public_layer_is_called():
    made = {type(calls._layer(name)[0]) for name in calls.LAYERS}
    for name, kind in constructors.constructors().items():
        if name.startswith(("layers.", "routers.")) and kind.__name__ != "Router":
            assert kind in made, f"{name} has no case in tests/support/layer_cases.py"


@pytest.mark.parametrize(("kind", "count"), [("constructors", 350), ("calls", 150)])
def test_any_argument(kind, count):
    tally = arguments.run(kind, count, 0, lambda text: None, batch=3)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.outcomes["refused"]
    assert tally.outcomes["works"]
