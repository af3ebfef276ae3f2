"""Every public name of the library, found by walking the packages.

A new name is fuzzed by itself where its arguments are known, or
tests/robustness/test_arguments.py fails and says what it lacks.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import keras_moe

# Public, though `import keras_moe` does not name them.
FURTHER = ("keras_moe.routing", "keras_moe.multitask.entire_space")

# Not fuzzed, and why.
EXEMPT = {
    "__version__": "a string",
    "callbacks.Alarm": "a record that CollapseAlarm makes",
    "callbacks.CollapseAlarm": "its argument is an ExpertMonitor",
    "callbacks.DatasetPosition": "its argument is a dataset",
    "callbacks.ExactBackup": "files have a profile of their own",
    "callbacks.ExpertMonitor": "its argument is a sample of data",
    "convert.from_keras_hub": "its argument is a block of KerasHub",
    "convert.replace_keras_hub_blocks": "its argument is a model of KerasHub",
    "distribution.ExpertParallel": "made by expert_parallel",
    "distribution.Plan": "a record that plan returns",
    "distribution.VariablePlacement": "a record that expert_parallel returns",
    "distribution.expert_parallel": "JAX alone",
    "distribution.save": "files have a profile of their own",
    "experts.Experts": "a protocol",
    "experts.GroupedExperts": "a protocol",
    "experts.GroupedMatmul": "a protocol",
    "export.Served": "made by load",
    "export.export_model": "files have a profile of their own",
    "export.export_saved_model": "files have a profile of their own",
    "export.load": "files have a profile of their own",
    "export.load_saved_model": "files have a profile of their own",
    "export.write_checksums": "files have a profile of their own",
    "multitask.Rows": "a record",
    "plots.calibration": "it draws on axes",
    "plots.expert_similarity": "it draws on axes",
    "plots.expert_usage": "it draws on axes",
    "plots.gate_heatmap": "it draws on axes",
    "plots.gradient_conflict": "it draws on axes",
    "plots.learning_curves": "it draws on axes",
    "plots.load_over_time": "it draws on axes",
    "plots.who_goes_where": "it draws on axes",
    "report": "files have a profile of their own",
    "routing.DenseRouting": "a record",
    "routing.ExpertChoiceRouting": "a record",
    "routing.Record": "a record",
    "routing.Routing": "a record",
    "routing.Runs": "a record",
    "routing.Slots": "a record",
    "routing.SortedChoices": "a record",
    "telemetry.Mixture": "a record that observe returns",
    "telemetry.Sign": "a record that signs_of_collapse returns",
    "telemetry.find_mixtures": "its argument is a model",
    "telemetry.gradient_conflict": "its argument is a model",
    "telemetry.kernel_similarity": "its argument is a layer",
    "telemetry.observe": "its argument is a model",
    "telemetry.output_similarity": "its argument is a layer",
    "telemetry.signs_of_collapse": "its argument is what summarise returns",
    "telemetry.summarise": "its argument is what observe returns",
    "telemetry.zero_activations": "its argument is a layer",
    "upcycling.revive": "it changes a built layer in place",
}


def public() -> dict[str, Any]:
    """Return the public classes and functions by their names below `keras_moe`."""
    found: dict[str, Any] = {}
    modules = [keras_moe, *map(importlib.import_module, FURTHER)]
    for module in modules:
        for name, thing in _walk(module):
            if callable(thing) and id(thing) not in map(id, found.values()):
                found[name] = thing
    return {name: thing for name, thing in found.items() if name not in EXEMPT}


def _walk(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    for name in _names(module):
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType):
            yield from _walk(thing)
        else:
            where = module.__name__.removeprefix("keras_moe").lstrip(".")
            yield f"{where}.{name}".lstrip("."), thing


def _names(module: types.ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and getattr(thing, "__module__", "") == module.__name__
    ]


def parameters(thing: Any) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a function, or of a class and its bases of ours."""
    if not inspect.isclass(thing):
        return _named(thing)
    found: dict[str, inspect.Parameter] = {}
    for base in thing.__mro__:
        if not base.__module__.startswith("keras_moe") or "__init__" not in vars(base):
            continue
        found = {**_named(base.__init__), **found}
        kinds = {p.kind for p in inspect.signature(base.__init__).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break  # It passes nothing on.
    return found


def _named(function: Any) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
