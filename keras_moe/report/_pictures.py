"""Pictures inside a page, as `data:` addresses."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_moe import plots
from keras_moe.plots._style import as_png

WIDTH = 480  # CSS px of a drawn picture, where the page has so many
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def of_file(path: Path) -> str:
    """Return the address of a picture in a file. A browser runs no script in it."""
    return _address(_TYPES[path.suffix], path.read_bytes())


def of_experts(observations: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield captions and pictures: load over time, gates, similarity, conflict."""
    last = observations[-1]
    for name, figures in last["mixtures"].items():
        seen = [o for o in observations if name in o["mixtures"]]
        if len(seen) > 1:
            yield (
                f"{name}: load of the experts over the training",
                _drawn(plots.load_over_time, seen, name),
            )
        sample = f"on the sample of {figures['rows']:,} rows"
        usage = figures["usage"]
        if len(usage) > 1:
            yield (
                f"{name}: mean weight of each expert for each gate, {sample}",
                _drawn(plots.gate_heatmap, usage[None], figures["gates"]),
            )
        similarity = figures.get("output_similarity")
        if similarity is not None:
            yield (
                f"{name}: correlation of the outputs of two experts, on the first rows "
                "of the sample, at most 256",
                _drawn(plots.expert_similarity, similarity),
            )
    cosines = last["gradient_cosines"]
    if cosines is not None:
        tasks = last["tasks"] or tuple(f"task {i}" for i in range(len(cosines)))
        yield (
            "Cosine of the gradients of two tasks by the shared parameters",
            _drawn(plots.gradient_conflict, cosines, tasks),
        )


def _drawn(plot: Callable[..., Any], *arguments: Any) -> str:
    return _address("image/png", as_png(plot, *arguments))


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
