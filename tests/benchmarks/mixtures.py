"""MMoE and PLE, training and serving, beside DeepCTR and torch-rechub."""

from __future__ import annotations

from tests.benchmarks.cases import Bar, Case, Group

TITLE = "MMoE and PLE"
ABOUT = """\
26 columns of ids (10,000 ids of 16 values each) and 13 columns of numbers, batches of
4096 rows, experts of 256 and 128 units, a tower of 64 units for each of two tasks, both
with a log loss. PLE has two levels; a quarter of the e experts of each level is shared.

"Training" is a whole step: forward pass, losses, backward pass, Adam on all weights
with the embeddings. For Keras models it is `model.train_function`, which `fit` compiles
and calls, on an iterator that repeats one batch; without XLA, as Keras runs by default
on a CPU. For torch-rechub it is a batch of its own `MTLTrainer.train_one_epoch`.
"Serving" is `model.predict_on_batch`, on torch the call of the model in inference mode.

All models have the same layers. DeepCTR runs with `l2_reg_embedding=0`; it then still
adds penalties of weight 0, except in the row "no penalties". torch-rechub runs without
its batch normalization and weight decay; the row "as published" has both. "Bare
matmuls" are the matrix products of the step alone.
"""

OURS, FUSED = "keras_moe", "keras_moe, FusedAdam"
DEEPCTR, RECHUB = "DeepCTR", "torch-rechub"
DEEPCTR_BARE = "DeepCTR, no penalties"
RECHUB_PUBLISHED = "torch-rechub, as published"
MATMULS = "bare matmuls"


def point(model: str, step: str, experts: int) -> dict[str, object]:
    """Return the point of a group."""
    return {"model": model, "step": step, "e": experts}


def _bars() -> list[Bar]:
    bars = []
    for e in (8, 16, 32):
        text = f"MMoE training (FusedAdam) against DeepCTR (Adam), e = {e}"
        bars.append(Bar(text, 1.25, point("MMoE", "training", e), FUSED, DEEPCTR))
    for e in (8, 16):
        text = f"PLE training (FusedAdam) against DeepCTR (Adam), e = {e}"
        bars.append(Bar(text, 1.15, point("PLE", "training", e), FUSED, DEEPCTR))
    for model, counts in {"MMoE": (8, 16, 32), "PLE": (8, 16)}.items():
        for e in counts:
            at = point(model, "training", e)
            text = f"{model} training, share of its bare matmuls, e = {e}"
            bars.append(Bar(text, 0.70, at, FUSED, MATMULS))
            text = f"{model} training against torch-rechub's trainer, e = {e}"
            bars.append(Bar(text, 1.25, at, FUSED, RECHUB))
    return bars


BARS = _bars()
PANELS = [{"model": model, "step": "training"} for model in ("MMoE", "PLE")]


def groups(profile: str) -> list[Group]:
    """Return a group for each model, step and number of experts."""
    if profile == "fast":
        return [_group("MMoE", "training", 8, profile)]
    counts = {"MMoE": (8, 16, 32), "PLE": (8, 16)}
    return [
        _group(model, step, experts, profile)
        for model in counts
        for step in ("training", "serving")
        for experts in counts[model]
    ]


def _group(model: str, step: str, experts: int, profile: str) -> Group:
    arguments = {"model": model, "experts": experts, "step": step}
    own, peers = "tests.benchmarks.ours", "tests.benchmarks.peers"
    cases = [
        Case(DEEPCTR, "deepctr", f"{peers}.deepctr", arguments),
        Case(OURS, "own", f"{own}.mixtures", arguments, ours=True),
        Case(MATMULS, "own", f"{own}.matmuls", arguments),
        Case(RECHUB, "torch", f"{peers}.torch_rechub", arguments),
    ]
    if step == "training":
        fused = {**arguments, "optimizer": "FusedAdam"}
        cases.insert(2, Case(FUSED, "own", f"{own}.mixtures", fused, ours=True))
        if profile != "fast":
            bare = {**arguments, "penalties": False}
            cases.append(Case(DEEPCTR_BARE, "deepctr", f"{peers}.deepctr", bare))
            published = {**arguments, "published": True}
            module = f"{peers}.torch_rechub"
            cases.append(Case(RECHUB_PUBLISHED, "torch", module, published))
    return Group("mixtures", point(model, step, experts), tuple(cases), DEEPCTR)
