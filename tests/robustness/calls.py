"""Cases of calls: layers, functions and methods with any arguments, and what is right.

Right is an error that names one of the changed arguments, or finite numbers; those of
the oracle where there is one. A layer's oracle is its own call with float32 rows.
"""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st

from tests.robustness import functions, uses, values
from tests.robustness.constructors import WrongError, _short, names_one
from tests.support import router_cases
from tests.support.layer_cases import CASES

LAYERS: dict[str, Any] = {
    **{case.name: case for case in CASES},
    **{f"router-{name}": name for name in router_cases.ALL},
}
_MADE: dict[str, tuple[Any, dict[str, Any]]] = {}

_FLOATS = ["F(1, 6)", "F(2, 3, 6)", "F(3, 6).astype('float64')", "F(0, 6)", "F(3, 5)"]
# By the name of the argument of `call`, beside its right value.
FURTHER = {
    "mask": ["None", "B(3)", "np.zeros(3, bool)", "B(3).astype('int32')", "B(2)"],
    "training": ["None", "True", "False"],
    "scenario": ["I(2, 3)", "np.array([0, 1, 9])", "I(2, 3).astype('int64')"],
    "router_inputs": ["None", "F(3, 6)", "F(3, 2)", "F(2, 6)"],
    "gate_inputs": ["None", "F(3, 6)", "F(3, 3)", "F(2, 6)"],
}


def subjects() -> list[str]:
    """The names of everything that is called."""
    return [*LAYERS, *functions.FUNCTIONS, *functions.METHODS]


def _subject(name: str) -> functions.Subject:
    return functions.FUNCTIONS.get(name) or functions.METHODS[name]


def _layer(name: str) -> tuple[Any, dict[str, Any]]:
    """A built layer and its right inputs by argument, made once."""
    if name not in _MADE:
        case = LAYERS[name]
        if isinstance(case, str):
            layer = router_cases.make(case)
            inputs = (
                [router_cases.feed(case, 3)[:, 0]]
                if case == "hash"
                else [values.floats(3, 6)]
            )
        else:
            layer, inputs = case.layer(), case.inputs(3)
        layer(*inputs)
        named = list(inspect.signature(layer.call).parameters)
        _MADE[name] = layer, dict(zip(named, inputs, strict=False))
    return _MADE[name]


def right_of(name: str) -> dict[str, list[str]]:
    """The right values of every argument, and others that may be right."""
    if name not in LAYERS:
        return _subject(name).right
    layer, inputs = _layer(name)
    found = {}
    for argument in inspect.signature(layer.call).parameters:
        shape = np.shape(inputs.get(argument, ()))
        found[argument] = FURTHER.get(argument, ["None"])
        if argument in inputs and argument not in FURTHER:
            own = ", ".join(map(str, shape))
            wider = ", ".join(map(str, (2, *shape)))
            found[argument] = [
                *(f"F({own})", f"F({wider})", f"F({own}).astype('float64')", *_FLOATS),
                *(f"F({own}).astype('float16')", f"I(4, {own})", f"F({own})[:1]"),
                *(f"F({own})[:0]", f"ops.convert_to_tensor(F({own}))"),
            ]
    return found


def changes(name: str) -> Any:
    """One or two arguments, as text; the layer is made here, before Hypothesis runs."""
    return _changes(right_of(name))


@st.composite
def _changes(draw: Any, right: dict[str, list[str]]) -> dict[str, str]:
    chosen = draw(
        st.lists(st.sampled_from(sorted(right)), min_size=1, max_size=2, unique=True)
    )
    pool = st.one_of(st.sampled_from(values.ANY), st.sampled_from(values.TENSORS))
    return {
        argument: draw(st.one_of(st.sampled_from(right[argument]), pool))
        for argument in chosen
    }


def text_of(name: str, given: dict[str, str]) -> str:
    return f"{name}({', '.join(f'{a}={text}' for a, text in given.items())})"


def judge(name: str, changed: dict[str, str]) -> str:
    """Return "refused" or "works"; raise WrongError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {a: values.value(text) for a, text in changed.items()}
        if name in LAYERS:
            layer, inputs = _layer(name)
            given = {**inputs, **arguments}
            call: Any = layer
        else:
            subject = _subject(name)
            base = {a: values.value(texts[0]) for a, texts in subject.right.items()}
            given, call = {**base, **arguments}, subject.call
        try:
            result = call(**given)
        except (ValueError, TypeError) as error:
            if not names_one(str(error), changed):
                raise WrongError(
                    f"names none of {list(changed)}: {_short(error)}"
                ) from error
            return "refused"
        except Exception as error:
            if re.search(
                "out of range|is not in \\[", str(error)
            ):  # Values of ids, which are data.
                return "refused"
            raise WrongError(f"refused with {_short(error)}") from error
        leaves = keras.tree.flatten(result)
        if any(isinstance(leaf, keras.KerasTensor) for leaf in leaves):
            return "works"  # A symbolic call.
        found = uses.flat(result)
        if name in LAYERS:
            _check_layer(LAYERS[name], layer, inputs, given, result, changed)
        else:
            _check_function(subject, given, found, changed)
    return "works"


def _check_function(subject: Any, given: Any, found: Any, changed: Any) -> None:
    arrays = {a: _array(v) for a, v in given.items()}
    known = all(text in subject.right[a] for a, text in changed.items())
    numbers_are = known and not subject.may_be_nan
    if numbers_are and not all(
        np.isfinite(a).all() for a in found if a.dtype.kind == "f"
    ):
        raise WrongError(f"not finite: {[a.ravel()[:4] for a in found]}")
    if subject.oracle is None or any(_size(a) == 0 for a in arrays.values()):
        return
    try:
        expected = np.asarray(subject.oracle(**arrays), "float64")
    except Exception as error:
        if not known:  # Values that have no result, such as the logarithm of -1.
            return
        raise WrongError(f"accepted, the oracle says {_short(error)}") from error
    array = np.asarray(found[0], "float64")
    if array.shape != expected.shape:
        raise WrongError(f"shape {array.shape} instead of {expected.shape}")
    if known and not np.allclose(array, expected, rtol=2e-3, atol=1e-4):
        raise WrongError(f"{array.ravel()[:3]} instead of {expected.ravel()[:3]}")


def _array(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    try:
        array = np.asarray(keras.ops.convert_to_numpy(value))
    except Exception:
        return value
    return array.astype("float64") if array.dtype.kind == "f" else array


def _size(value: Any) -> int:
    return value.size if isinstance(value, np.ndarray) else 1


def _check_layer(
    case: Any, layer: Any, inputs: Any, given: Any, result: Any, changed: Any
) -> None:
    """Compare with the call of float32 rows in inference."""
    arrays = uses.flat(result)
    first = next(iter(inputs))
    leading = np.shape(given[first])[:-1]
    for array in arrays:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WrongError(f"not finite: {array.ravel()[:4]}")
    if isinstance(case, str) or set(changed) - {first}:
        return
    for array in arrays:
        if array.shape[: len(leading)] != leading:
            raise WrongError(f"shape {array.shape} for the leading axes {leading}")
    if (
        case.rows_compete
        or layer.least_rank > 2
        or len(inputs) > 1
        or not np.prod(leading)
    ):
        return
    rows = np.asarray(_array(given[first]), "float32").reshape(
        -1, np.shape(given[first])[-1]
    )
    expected = uses.flat(layer(rows))
    for a, b in zip(arrays, expected, strict=True):
        if not np.allclose(a.reshape(b.shape), b, rtol=2e-2, atol=2e-2):
            raise WrongError(f"{a.ravel()[:3]} instead of {b.ravel()[:3]}")
