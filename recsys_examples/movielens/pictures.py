"""Plots of a run: learning curves, gates, experts, calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from keras_moe import plots
from keras_moe.layers import MMoE
from recsys_examples.movielens.evaluation import Rows
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import TASKS, Ranker
from recsys_examples.movielens.profiles import KINDS, Profile, profile_experts
from recsys_examples.movielens.ranking import LIKED

# Inches and dots an inch: text is readable where a phone shows the report of a run.
WIDTH, DPI = 4.4, 120


def draw(
    folder: Path,
    curves: dict[str, list[float]],
    ranker: Ranker,
    sequences: Sequences,
    catalogue: Catalogue,
    rows: Rows,
    predictions: dict[str, np.ndarray],
) -> None:
    """Write all plots of a run as PNG files into a folder."""
    figures = {
        "learning_curves": _learning_curves(curves),
        "calibration": _calibration(rows, predictions),
    }
    if isinstance(ranker.body, MMoE):
        users = np.flatnonzero(sequences.lengths)
        features = ranker.user.predict(
            sequences.histories(catalogue, users), batch_size=256, verbose=0
        )
        gates = np.asarray(ranker.body.gate_weights(features))
        figures["gate_weights"] = _of_users(plots.gate_heatmap, gates)
        figures["expert_usage"] = _of_users(plots.expert_usage, gates)
    profile = profile_experts(ranker, sequences, catalogue)
    if profile.num_experts:
        figures["expert_lifts"] = _lifts(profile)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
    plt.close("all")


def _of_users(plot: Callable[..., Axes], gates: np.ndarray) -> plt.Figure:
    """Plot the gates of all users; the page of a run also has those of a sample."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.3), layout="constrained")
    plot(gates, TASKS, ax)
    ax.set_title(f"{ax.get_title()}, all {len(gates):,} users")
    return figure


def _lifts(profile: Profile) -> plt.Figure:
    """What each expert's users have more (or less) of than the average user."""
    figure, axes = plt.subplots(
        len(KINDS), 1, figsize=(WIDTH, 2.4 * len(KINDS)), layout="constrained"
    )
    changes = [100 * (getattr(profile, kind).values - 1) for kind in KINDS]
    largest = max(np.abs(change).max(initial=1.0) for change in changes)
    for ax, kind, change in zip(axes, KINDS, changes, strict=True):
        names = getattr(profile, kind).names
        image = ax.imshow(
            change, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto"
        )
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_yticks(range(profile.num_experts))
        ax.set_ylabel("expert")
    axes[0].set_title("users of an expert, compared with all users", fontsize="medium")
    figure.colorbar(
        image,
        ax=axes,
        location="bottom",
        aspect=40,
        label="more of it than the average user, %",
    )
    return figure


def _learning_curves(curves: dict[str, list[float]]) -> plt.Figure:
    """Losses by task, and the validation NDCG below."""
    figure, (losses, quality) = plt.subplots(
        2, 1, figsize=(WIDTH, 5.5), layout="constrained", height_ratios=(3, 2)
    )
    plots.learning_curves(curves, TASKS, losses)
    ndcg = curves["val_ndcg@10"]
    epochs = range(1, len(ndcg) + 1)
    # As validation is drawn above.
    quality.plot(epochs, ndcg, "s-", color="grey", markerfacecolor="none")
    quality.set_ylim(0, 1.1 * max(ndcg))
    quality.set(xlabel="epoch", ylabel="NDCG@10")
    quality.set_title("validation, whole catalogue")
    quality.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _calibration(rows: Rows, predictions: dict[str, np.ndarray]) -> plt.Figure:
    """Reliability diagram with ten bins: watches, and likes of what was watched."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.3), layout="constrained")
    watched = rows.watched
    plots.calibration(
        {"watch": predictions["watch"], "like": predictions["like"][watched]},
        {"watch": watched, "like": rows.ratings[watched] >= LIKED},
        ax=ax,
    )
    return figure
