"""The pictures of a run: what the candidates hold, and what diversity costs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a run may have no screen

import matplotlib.pyplot as plt

from recsys_examples.two_stage.pipeline import Outcome


def draw(folder: Path, outcome: Outcome) -> None:
    """Write the pictures of a run as PNG files into a folder."""
    _funnel(outcome).savefig(folder / "funnel.png", dpi=120)
    _diversity(outcome).savefig(folder / "diversity.png", dpi=120)
    plt.close("all")


def _funnel(outcome: Outcome) -> plt.Figure:
    """Recall of the first stage by the number of candidates."""
    figure, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    counts = list(outcome.funnel)
    ax.plot(counts, list(outcome.funnel.values()), "o-")
    ax.axvline(outcome.settings.candidates, linestyle=":", color="grey")
    ax.annotate(
        "handed to the ranker",
        (outcome.settings.candidates, 0.02),
        xytext=(4, 0),
        textcoords="offset points",
    )
    ax.set(xscale="log", ylim=(0, 1), xlabel="candidates", ylabel="recall")
    ax.set_title("relevant movies of the test window among the candidates")
    return figure


def _diversity(outcome: Outcome) -> plt.Figure:
    """NDCG@10 against diversity within a list, by the weight of likeness."""
    figure, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    tried = outcome.chosen["validation_diversity"]
    x = [quality["diversity@10"] for quality in tried.values()]
    y = [quality["ndcg@10"] for quality in tried.values()]
    ax.plot(x, y, "o-")
    for weight, at in zip(tried, zip(x, y, strict=True), strict=True):
        chosen = float(weight) == outcome.fusion.diversity
        ax.annotate(
            f"{weight}, chosen" if chosen else weight,
            at,
            xytext=(4, 4),
            textcoords="offset points",
        )
    ax.set(xlabel="diversity within a list", ylabel="validation NDCG@10")
    ax.set_title("what diversity costs, by its weight")
    return figure
