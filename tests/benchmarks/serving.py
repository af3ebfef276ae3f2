"""The time to a first training step, and a SavedModel: size and latency."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "Start and serving"
ABOUT = """\
The models of the section above with 8 experts. "First step": from the start
of the interpreter to the end of the first training step, in a new process each time,
and its parts: the imports, building the model with its batch, and the step with its
compilation. "SavedModel": written by `model.export`, loaded with
`tf.saved_model.load`, and called by its signature `serving_default`; the time is the
median of the calls of a round (p50), and p99 is that of the slowest hundredth.
"""

OURS, DEEPCTR = "keras_moe", "DeepCTR"
EXPERTS = 8
CALLS = {1: 300, 256: 200, 4096: 200}


def first_step_point(model: str) -> dict[str, object]:
    """Return the point of the group of first steps."""
    return {"measured": "first step", "model": model}


def saved_model_point(model: str, batch: int, threads: int) -> dict[str, object]:
    """Return the point of a group of SavedModels."""
    return {
        "measured": "SavedModel",
        "threads": threads,
        "model": model,
        "batch": batch,
    }


BARS = [
    Bar(
        "speed to the first training step, against DeepCTR",
        1.0,
        first_step_point("MMoE"),
        OURS,
        DEEPCTR,
    ),
    Bar(
        "speed of the SavedModel (p50) against DeepCTR's, batch 256",
        1.0,
        saved_model_point("MMoE", 256, threads=2),
        OURS,
        DEEPCTR,
    ),
]


def groups(profile: str) -> list[Group]:
    """Return a group for each model and measurement."""
    if profile == "fast":
        return [_first_step("MMoE", rounds=1), _saved_model("MMoE", 256, threads=2)]
    return [_first_step(model, rounds=7) for model in ("MMoE", "PLE")] + [
        _saved_model(model, batch, threads)
        for model in (("MMoE",) if profile == "regular" else ("MMoE", "PLE"))
        for threads in (1, 2)
        for batch in CALLS
    ]


def _first_step(model: str, rounds: int) -> Group:
    arguments = {"model": model, "experts": EXPERTS, "step": "training"}
    cases = tuple(
        Case(
            series,
            environment,
            "tests.benchmarks.first_step",
            {"module": module, "arguments": arguments},
            ours=series == OURS,
        )
        for series, environment, module in _LIBRARIES
    )
    return Group("serving", first_step_point(model), cases, DEEPCTR, rounds=rounds)


def _saved_model(model: str, batch: int, threads: int) -> Group:
    cases = tuple(
        Case(
            series,
            environment,
            "tests.benchmarks.saved_model",
            {
                "module": module,
                "model": model,
                "experts": EXPERTS,
                "batch": batch,
                "calls": CALLS[batch],
            },
            ours=series == OURS,
        )
        for series, environment, module in _LIBRARIES
    )
    point = saved_model_point(model, batch, threads)
    return Group("serving", point, cases, DEEPCTR, threads=threads)


_LIBRARIES = [
    (DEEPCTR, "deepctr", "tests.benchmarks.peers.deepctr"),
    (OURS, "own", "tests.benchmarks.ours.mixtures"),
]
