"""MMoE and PLE, training and serving, beside DeepCTR and torch-rechub."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "MMoE and PLE"
ABOUT = ""
BARS: list[Bar] = []

OURS, FUSED, DEEPCTR = "keras_moe", "keras_moe, FusedAdam", "DeepCTR"


def groups(profile: str) -> list[Group]:
    """Return a group for each model, step and number of experts."""
    arguments = {"model": "MMoE", "experts": 4, "step": "training"}
    module = "tests.benchmarks.ours.mixtures"
    fused = {**arguments, "optimizer": "FusedAdam"}
    cases = (
        Case(OURS, "own", module, arguments, ours=True),
        Case(FUSED, "own", module, fused, ours=True),
    )
    return [Group("mixtures", {"model": "MMoE", "e": 4}, cases, baseline=OURS)]
