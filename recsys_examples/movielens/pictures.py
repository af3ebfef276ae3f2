"""Plots of a run: learning curves, gates, experts, calibration."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve

from keras_moe import plots
from keras_moe.layers import MMoE
from recsys_examples.movielens.evaluation import Rows
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import TASKS, Ranker
from recsys_examples.movielens.profiles import KINDS, Profile, profile_experts
from recsys_examples.movielens.ranking import LIKED


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
    _learning_curves(curves).savefig(folder / "learning_curves.png", dpi=120)
    _calibration(rows, predictions).savefig(folder / "calibration.png", dpi=120)
    if isinstance(ranker.body, MMoE):
        users = np.flatnonzero(sequences.lengths)
        features = ranker.user.predict(
            sequences.histories(catalogue, users), batch_size=256, verbose=0
        )
        gates = np.asarray(ranker.body.gate_weights(features))
        figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
        plots.gate_heatmap(gates, TASKS, ax)
        figure.savefig(folder / "gate_weights.png", dpi=120)
        figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
        plots.expert_usage(gates, TASKS, ax)
        figure.savefig(folder / "expert_usage.png", dpi=120)
    profile = profile_experts(ranker, sequences, catalogue)
    if profile.num_experts:
        _lifts(profile).savefig(folder / "expert_lifts.png", dpi=120)
    plt.close("all")


def _lifts(profile: Profile) -> plt.Figure:
    """What each expert's users have more (or less) of than the average user."""
    figure, axes = plt.subplots(
        len(KINDS), 1, figsize=(7, 2.4 * len(KINDS)), layout="constrained"
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
    axes[0].set_title("what an expert's users have more of than the average user, %")
    figure.colorbar(image, ax=axes, shrink=0.5)
    return figure


def _learning_curves(curves: dict[str, list[float]]) -> plt.Figure:
    """Losses by task on the left, validation NDCG on the right."""
    figure, (losses, quality) = plt.subplots(
        1, 2, figsize=(9, 3.5), layout="constrained"
    )
    epochs = np.arange(1, len(curves["loss"]) + 1)
    for task, colour in zip(TASKS, ("C0", "C1", "C2"), strict=True):
        first = curves[f"{task}_loss"][0]
        for name, style in ((f"{task}_loss", "o-"), (f"val_{task}_loss", "s:")):
            losses.plot(epochs, np.array(curves[name]) / first, style, color=colour)
        losses.plot([], [], color=colour, label=task)
    losses.plot([], [], "o-", color="grey", label="training")
    losses.plot([], [], "s:", color="grey", label="validation")
    losses.set_title("loss, first epoch's training loss = 1")
    losses.legend()
    quality.plot(epochs, curves["val_ndcg@10"], "s:", color="black")
    quality.set_ylim(0, 1.1 * max(curves["val_ndcg@10"]))
    quality.set_title("validation NDCG@10, whole catalogue")
    for ax in (losses, quality):
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _calibration(rows: Rows, predictions: dict[str, np.ndarray]) -> plt.Figure:
    """Reliability diagrams with ten quantile bins."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    watched = rows.watched
    panels = {
        "watch": (watched, predictions["watch"]),
        "like": (rows.ratings[watched] >= LIKED, predictions["like"][watched]),
    }
    for ax, (task, (labels, probabilities)) in zip(axes, panels.items(), strict=True):
        observed, predicted = calibration_curve(
            labels, probabilities, n_bins=10, strategy="quantile"
        )
        ax.plot([0, 1], [0, 1], ":", color="grey")
        ax.plot(predicted, observed, "o-")
        ax.set(
            title=task,
            xlabel="predicted probability",
            ylabel="observed share",
            xlim=(0, 1),
            ylim=(0, 1),
            aspect="equal",
        )
    return figure
