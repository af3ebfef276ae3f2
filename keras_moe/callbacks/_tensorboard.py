"""Observations of mixtures as events of TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_moe import plots
from keras_moe.plots._style import as_png
from keras_moe.telemetry import Mixture

_NEEDED = ("tensorflow", "tensorboard", "matplotlib")


class TensorBoardWriter:
    """Writes scalars, histograms and pictures for TensorBoard.

    Args:
        log_dir: path, the folder of the events.

    Raises:
        ImportError: if TensorFlow, TensorBoard or matplotlib is not installed.
    """

    def __init__(self, log_dir: Path) -> None:
        for package in _NEEDED:
            if importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"`log_dir` needs {package}: run `pip install {package}`, or leave "
                    f"`log_dir` out. Received: log_dir={str(log_dir)!r}"
                )
        import tensorflow as tf

        self._tf = tf
        self._writer = tf.summary.create_file_writer(str(log_dir))

    def write(
        self,
        seen: dict[str, Any],
        scalars: dict[str, float],
        mixtures: Sequence[Mixture],
    ) -> None:
        """Write an observation of `ExpertMonitor`."""
        summary, step = self._tf.summary, seen["step"]
        with self._writer.as_default(step=step):
            for name, value in scalars.items():
                summary.scalar(f"experts/{name}", value)
            for mixture in mixtures:
                figures = seen["mixtures"][mixture.name]
                largest = mixture.weights.max(axis=-1)
                for i, gate in enumerate(mixture.gates):
                    summary.histogram(
                        f"{mixture.name}/largest_weight/{gate}", largest[:, i]
                    )
                for k, load in enumerate(figures["load"]):
                    summary.scalar(f"{mixture.name}/load/expert_{k}", float(load))
                for kind, content in _pictures(mixture, figures).items():
                    picture = self._tf.io.decode_png(content)[None]
                    summary.image(f"{mixture.name}/{kind}", picture)
            self._writer.flush()

    def flush(self) -> None:
        """Write to the disk what is not there yet."""
        self._writer.flush()


def _pictures(mixture: Mixture, figures: dict[str, Any]) -> dict[str, bytes]:
    found = {"gates": as_png(plots.gate_heatmap, mixture.weights, mixture.gates)}
    similarity = figures["output_similarity"]
    if similarity is not None:
        found["output_similarity"] = as_png(plots.expert_similarity, similarity)
    return found
