"""Observations of mixtures as events of TensorBoard."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_moe import plots
from keras_moe.plots._style import as_png
from keras_moe.telemetry import Mixture

_NEEDED = ("tensorflow", "tensorboard", "matplotlib")
# Of the time of a `fit`. A picture takes 0.1 s or more, nearly all of it in matplotlib.
_SHARE = 0.01


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
        # Step, tag, plot and its arguments, of pictures that are not drawn yet.
        self._waiting: list[tuple[Any, ...]] = []
        self._drawing = 0.0
        self.begin()

    def begin(self) -> None:
        """Begin a `fit`: pictures may take `_SHARE` of its time."""
        self._draw()  # Of a `fit` that was interrupted.
        self._start, self._drawing = time.perf_counter(), 0.0

    def write(
        self,
        seen: dict[str, Any],
        scalars: dict[str, float],
        mixtures: Sequence[Mixture],
    ) -> None:
        """Write an observation of `ExpertMonitor`.

        Its pictures are drawn now if those before have taken at most `_SHARE` of the
        time since `begin`. `end` draws those of the last observation.
        """
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
        self._waiting = [
            (step, *picture)
            for mixture in mixtures
            for picture in _pictures(mixture, seen["mixtures"][mixture.name])
        ]
        if self._drawing <= _SHARE * (time.perf_counter() - self._start):
            self._draw()
        self._writer.flush()

    def end(self) -> None:
        """Draw the pictures of the last observation, and write all to the disk."""
        self._draw()
        self._writer.flush()

    def _draw(self) -> None:
        start = time.perf_counter()
        for step, tag, plot, *arguments in self._waiting:
            picture = self._tf.io.decode_png(as_png(plot, *arguments))[None]
            with self._writer.as_default(step=step):
                self._tf.summary.image(tag, picture)
        self._waiting = []
        self._drawing += time.perf_counter() - start


def _pictures(mixture: Mixture, figures: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the tag, the plot and its arguments."""
    weights, gates = mixture.weights, mixture.gates
    yield f"{mixture.name}/gates", plots.gate_heatmap, weights, gates
    similarity = figures["output_similarity"]
    if similarity is not None:
        tag = f"{mixture.name}/output_similarity"
        yield tag, plots.expert_similarity, similarity
