"""The folder of a run: its record, its observations of experts, its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_moe.report._names import EXPERTS, RECORD

_PICTURES = (".png", ".svg")


class Run(NamedTuple):
    """What a folder has of a run.

    Attributes:
        folder: the folder.
        record: dict, the content of `metrics.json`; empty without one.
        tables: list of dicts with `title`, `columns` and `rows`, from the record.
        findings: list of texts, from the record.
        warnings: list of texts, from the record.
        observations: list of dicts, those of an `ExpertMonitor` with
            `file="experts.jsonl"`; empty without one.
        pictures: paths of the pictures in the folder.
    """

    folder: Path
    record: dict[str, Any]
    tables: list[dict[str, Any]]
    findings: list[Any]
    warnings: list[Any]
    observations: list[dict[str, Any]]
    pictures: list[Path]


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: if it is no folder, has nothing of a run, or a file is damaged.
    """
    if not folder.is_dir():
        raise ValueError(
            f"`run` must be the folder of a run. Received: {folder}, which is "
            f"{'a file' if folder.exists() else 'not there'}"
        )
    record, observations = folder / RECORD, folder / EXPERTS
    if not record.exists() and not observations.exists():
        raise ValueError(
            f"`run` must have a file {RECORD} (results of an example) or {EXPERTS} "
            f"(of an ExpertMonitor). Received: {folder}, which has neither"
        )
    found = _json(record, record.read_bytes()) if record.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{record}: not the results of a run. Delete it and run again")
    tables, findings = found.get("tables") or [], found.get("findings") or []
    warnings = found.get("warnings") or []
    texts = isinstance(findings, list) and isinstance(warnings, list)
    if not (_are_tables(tables) and texts):
        raise ValueError(
            f"{record}: `tables` must be a list of objects with `title`, `columns` and "
            "rows of as many cells, and `findings` and `warnings` lists. Delete it and "
            "run again"
        )
    content = observations.read_bytes() if observations.exists() else b""
    # A process that was killed may have left a part of a line.
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    if not record.exists() and not lines:
        raise ValueError(
            f"`run` must have an observation, or a file {RECORD}. Received: {folder}, "
            f"whose {EXPERTS} has no line: `fit` had no epoch yet"
        )
    pictures = [p for p in sorted(folder.iterdir()) if p.suffix in _PICTURES]
    seen = [_observation(observations, _json(observations, line)) for line in lines]
    return Run(folder, found, tables, findings, warnings, seen, pictures)


def _are_tables(value: Any) -> bool:
    try:
        return isinstance(value, list) and all(
            isinstance(table["title"], str)
            and isinstance(table["columns"], list)
            and all(len(row) == len(table["columns"]) for row in table["rows"])
            for table in value
        )
    except (KeyError, TypeError):
        return False


def _json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except ValueError as error:
        raise ValueError(
            f"{path}: no valid JSON ({error}). Delete it and run again"
        ) from error


def _observation(path: Path, found: Any) -> dict[str, Any]:
    """Return an observation with arrays, as `ExpertMonitor` has it."""
    try:
        mixtures = {}
        for name, figures in found["mixtures"].items():
            arrays = {
                key: np.array(value, "float64") if isinstance(value, list) else value
                for key, value in figures.items()
                if key != "gates"
            }
            if arrays["usage"].shape != (len(figures["gates"]), len(arrays["load"])):
                raise ValueError
            mixtures[name] = {**arrays, "gates": tuple(figures["gates"])}
        cosines = found.get("gradient_cosines")
        return {
            "epoch": int(found["epoch"]),
            "step": int(found["step"]),
            "mixtures": mixtures,
            "gradient_cosines": None if cosines is None else np.array(cosines, float),
            "tasks": tuple(found.get("tasks") or ()),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the observations of an ExpertMonitor. Delete it and run again"
        ) from error
