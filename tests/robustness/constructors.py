"""Cases of constructors: any arguments, and what is right.

Right is an error that names one of the changed arguments, or an object that works, is
saved, is loaded in Keras' safe mode and then gives the same numbers.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st

from tests.robustness import surface, uses, values

LAYER = ("activity_regularizer", "autocast", "dtype", "name", "trainable")
OPTIMIZER = (
    *("clipnorm", "clipvalue", "ema_momentum", "ema_overwrite_frequency"),
    *("global_clipnorm", "gradient_accumulation_steps", "loss_scale_factor", "name"),
    *("use_ema", "weight_decay"),
)

# Arguments of one class whose right values are not those of the name.
OWN: dict[str, dict[str, list[str]]] = {
    "AITM": {"units": ["4", "np.int64(3)"]},
    "ByGroup": {"metric": ["keras_rs.metrics.NDCG()", "keras_rs.metrics.NDCG(k=2)"]},
    "BySegment": {"group": ["'segment'"]},
    "CGC": {"experts": ["None", "MLPExperts(3, (8, 5))"]},
    "CombinedMonitor": {"weights": ["{'a': 1.0}", "{'a': 1, 'b': -0.5}"]},
    "DSelectK": {"experts": ["None", "MLPExperts(4, 5)"]},
    "EPNet": {"gate_units": ["None", "4"]},
    "FixedWeighting": {},
    "GateNU": {"units": ["4", "np.int64(3)"]},
    "GLUExperts": {"units": ["None", "5", "np.int64(4)"]},
    "HashRouter": {"top_k": ["1", "2"], "seed": ["0", "7", "np.int64(3)"]},
    "HoME": {"experts": ["None"]},
    "M3oE": {"experts": ["None", "MLPExperts(5, 5)"], "num_scenarios": ["2", "3"]},
    "PEPNet": {"gate_units": ["None", "4"]},
    "PPNet": {"gate_units": ["None", "4"]},
    "Ranking": {"loss": ["'pairwise_logistic'"]},
    "RankingLoss": {"loss": ["'pairwise_logistic'"]},
    "RankAUC": {"num_bins": ["16", "100"]},
    "STAR": {"num_scenarios": ["2", "3"]},
    "PartitionedNormalization": {"num_scenarios": ["2", "3"]},
    "Task": {"name": ["'a'", "'b'"]},
}
# Instead of the first right value of a required argument.
NOT_REQUIRED_BUT_GIVEN = {
    **{
        name: {"expert_units": "(8, 5)", "tasks": "['a', 'b']"} for name in values.NAMES
    },
    "MoE": {"num_experts": "4", "expert_units": "(8, 5)"},
    "SoftMoE": {"num_experts": "4", "expert_units": "(8, 5)"},
    "HierarchicalMoE": {"expert_units": "(8, 5)"},
    "GAUC": {"max_rows": "16"},
    "XAUC": {"max_rows": "16"},
    "ByGroup": {"max_rows": "16"},
    "BySegment": {"group": "'segment'"},
    "RankAUC": {"num_bins": "16"},
}
for _name in ("MMoE", "OMoE", "DSelectK"):
    NOT_REQUIRED_BUT_GIVEN[_name] = {
        "num_experts": "4",
        **NOT_REQUIRED_BUT_GIVEN["PLE"],
    }


def constructors() -> dict[str, type]:
    """The public classes whose constructors are fuzzed."""
    return {
        name: thing
        for name, thing in surface.public().items()
        if inspect.isclass(thing) and name != "multitask.MultiTaskModel"
    }


def arguments_of(kind: type) -> dict[str, list[str]]:
    """The right values of every argument; KeyError for an argument without any."""
    own = OWN.get(kind.__name__, {})
    found = {}
    extra = {keras.layers.Layer: LAYER, keras.optimizers.Optimizer: OPTIMIZER}
    names = list(surface.parameters(kind))
    for base, more in extra.items():
        names += [name for name in more if issubclass(kind, base) and name not in names]
    for name in names:
        if name not in own and name not in values.RIGHT:
            raise KeyError(
                f"{kind.__name__}: the argument {name!r} has no strategy; add right "
                "values to RIGHT in tests/robustness/values.py"
            )
        found[name] = own.get(name) or values.RIGHT[name]
    return found


def base_of(kind: type) -> dict[str, str]:
    """The arguments of a case that changes none: the required ones."""
    right = arguments_of(kind)
    signature = inspect.signature(kind.__init__).parameters
    given = NOT_REQUIRED_BUT_GIVEN.get(kind.__name__, {})
    return {
        name: given.get(name, right[name][0])
        for name in right
        if name in signature
        and (signature[name].default is inspect.Parameter.empty or name in given)
    }


@st.composite
def changes(draw: Any, kind: type) -> dict[str, str]:
    """One to three arguments, as text: right values and any others."""
    right = arguments_of(kind)
    if not right:
        return {}
    names = draw(
        st.lists(st.sampled_from(sorted(right)), min_size=1, max_size=3, unique=True)
    )
    return {
        name: draw(st.one_of(st.sampled_from(right[name]), st.sampled_from(values.ANY)))
        for name in names
    }


def text_of(kind: type, given: dict[str, str]) -> str:
    arguments = ", ".join(f"{name}={text}" for name, text in given.items())
    return f"{kind.__name__}({arguments})"


def names_one(message: str, names: Any) -> bool:
    """Whether a message holds one of the names as a word."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names)


class WrongError(Exception):
    """The outcome of a case is not right."""


def judge(kind: type, changed: dict[str, str]) -> str:
    """Return what came of a case: "refused" or "works"; raise Wrong."""
    given = {**base_of(kind), **changed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {name: values.value(text) for name, text in given.items()}
        try:
            made = kind(**arguments)
        except (ValueError, TypeError) as error:
            if not names_one(str(error), changed):
                raise WrongError(
                    f"names none of {list(changed)}: {_short(error)}"
                ) from error
            return "refused"
        except Exception as error:
            raise WrongError(f"refused with {_short(error)}") from error
        if any("lambda" in text or text == "len" for text in changed.values()):
            return "works"  # A function of the user's; Keras cannot save it.
        try:
            _check(made, zlib.crc32(text_of(kind, given).encode()))
        except WrongError:
            raise
        except Exception as error:
            raise WrongError(f"accepted, then {_short(error)}") from error
    return "works"


def _check(made: Any, chosen: int) -> None:
    """Use, save and load; train one in 4 and write a file of one in 40, by `chosen`."""
    if isinstance(made, keras.callbacks.Callback):  # Nothing of it is saved.
        _finite(made, uses.numbers(made))
        return
    if type(made) in uses.ABSTRACT:
        return
    again = saved_and_loaded(made)
    if isinstance(made, keras.layers.Layer):
        _check_layer(made, again, with_training=chosen % 4 == 0)
        if chosen % 40 == 1:
            _check_file(made)
        return
    seeded = not isinstance(made, keras.initializers.Initializer)
    first = uses.numbers(made)
    _finite(made, first)
    if seeded:
        _same(first, uses.numbers(again))


def saved_and_loaded(made: Any) -> Any:
    """The object that a `.keras` file would give back, loaded in safe mode."""
    try:
        config = keras.saving.serialize_keras_object(made)
        text = json.dumps(config)
    except Exception as error:
        raise WrongError(f"accepted, but not saved: {_short(error)}") from error
    try:
        again = keras.saving.deserialize_keras_object(json.loads(text), safe_mode=True)
        assert type(again) is type(made), type(again)
        second = json.dumps(keras.saving.serialize_keras_object(again))
    except Exception as error:
        raise WrongError(f"saved, but not loaded: {_short(error)}") from error
    if second != text:
        raise WrongError(f"saved as {text[:600]}, loaded as {second[:600]}")
    return again


def _check_layer(layer: Any, again: Any, with_training: bool) -> None:
    outputs = uses.call(layer)
    shapes = uses.expected_shapes(layer)
    found = keras.tree.map_structure(lambda o: tuple(o.shape), outputs)
    if shapes is not None and found != shapes:
        raise WrongError(f"shapes {found} instead of {shapes}")
    _finite(layer, uses.flat(outputs))
    # As a file does it.
    again.build_from_config(json.loads(json.dumps(layer.get_build_config())))
    again.set_weights(layer.get_weights())
    _same(uses.flat(outputs), uses.flat(uses.call(again)))
    if not with_training:
        return
    try:
        trained = uses.flat(uses.call(layer, training=True))
    except ValueError as error:
        if not names_one(str(error), surface.parameters(type(layer))):
            raise
        return  # A documented limit of training, such as a weight without gradient.
    _finite(layer, trained)
    if isinstance(getattr(layer, "seed", None), int):
        _same(trained, uses.flat(uses.call(again, training=True)))


def _check_file(layer: Any) -> None:
    inputs = uses.inputs_of(layer)
    if not all(np.shape(x)[:1] == (3,) for x in keras.tree.flatten(inputs)):
        return
    given = {}
    if getattr(getattr(layer, "router", None), "reads_ids", False):
        given["router_inputs"] = uses.IDS
    symbolic = keras.tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype.name), (inputs, given)
    )
    model = keras.Model(symbolic, layer(*symbolic[0], **symbolic[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        again = keras.saving.load_model(path)
    _same(uses.flat(model((inputs, given))), uses.flat(again((inputs, given))))


def _finite(made: Any, arrays: list[np.ndarray]) -> None:
    for array in arrays:
        finite = array.dtype.kind != "f" or np.isfinite(array).all()
        if not finite and not uses.may_be_nan(made):
            raise WrongError(f"not finite: {array.ravel()[:4]}")


def _same(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    if len(first) != len(second):
        raise WrongError(f"{len(first)} outputs, loaded {len(second)}")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or not np.allclose(
            a, b, rtol=1e-5, atol=1e-6, equal_nan=True
        ):
            raise WrongError(
                f"other numbers once loaded: {a.ravel()[:3]}, {b.ravel()[:3]}"
            )


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
