"""Plots of a run: recall of the candidates, and the trade-off of diversity."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from recsys_examples.plotting import REFERENCE, marked
from recsys_examples.two_stage.pipeline import Outcome


def draw(folder: Path, outcome: Outcome) -> None:
    """Write the plots of a run as PNG files into a folder."""
    _funnel(outcome).savefig(folder / "funnel.png", dpi=120)
    _diversity(outcome).savefig(folder / "diversity.png", dpi=120)
    plt.close("all")


def _funnel(outcome: Outcome) -> plt.Figure:
    """Recall of the first stage by the number of candidates."""
    figure, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    counts = list(outcome.funnel)
    ax.plot(counts, list(outcome.funnel.values()), **marked(0))
    ax.axvline(outcome.settings.candidates, **REFERENCE)
    ax.annotate(
        "candidates of the ranker",
        (outcome.settings.candidates, 0.02),
        xytext=(4, 0),
        textcoords="offset points",
    )
    ax.set(xscale="log", ylim=(0, 1), xlabel="candidates", ylabel="recall")
    ax.set_title("recall of the candidates, test window")
    return figure


def _diversity(outcome: Outcome) -> plt.Figure:
    """NDCG@10 against intra-list diversity, by the weight `diversity`."""
    figure, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    tried = outcome.chosen["validation_diversity"]
    x = [quality["diversity@10"] for quality in tried.values()]
    y = [quality["ndcg@10"] for quality in tried.values()]
    ax.plot(x, y, **marked(0))
    for weight, at in zip(tried, zip(x, y, strict=True), strict=True):
        chosen = float(weight) == outcome.fusion.diversity
        ax.annotate(
            f"{weight}, chosen" if chosen else weight,
            at,
            xytext=(4, 4),
            textcoords="offset points",
        )
    ax.set(xlabel="intra-list diversity", ylabel="validation NDCG@10")
    ax.set_title("NDCG against diversity, by weight")
    return figure
