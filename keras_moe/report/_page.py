"""One self-contained HTML page: figures, tables, alarms, settings and versions."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from keras_moe import _checks, _files
from keras_moe.report import _pictures
from keras_moe.report._run import Run, read_run
from keras_moe.telemetry import signs_of_collapse

_PACKAGES = ("keras-moe", "keras", "tensorflow", "jax", "torch", "numpy")
_NUMERIC = ' class="number"'
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?([ %([]|$)")
_STYLE = """
:root { color-scheme: light dark; --line: #bbb; --soft: #f2f2f2; --warn: #a33; }
@media (prefers-color-scheme: dark) {
  :root { --line: #555; --soft: #2a2a2a; --warn: #f99; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0;
  text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
img { max-width: 100%; height: auto; background: white; }
figure { margin: 1rem 0; }
.alarm { border-left: 4px solid var(--warn); background: var(--soft);
  padding: .5rem .75rem; margin: .5rem 0; }
details { margin: .5rem 0; } pre { overflow-x: auto; background: var(--soft);
  padding: .5rem; }
"""


def report(
    run: str | Path, path: str | Path | None = None, title: str | None = None
) -> Path:
    """Write one HTML page about a training run.

    The page needs no network and no other file: pictures are inside. It has the
    results, what the experts do, alarms, the pictures of the run, its settings and the
    versions, and can be read on a phone, on dark and on light pages.

    Args:
        run: str or path, the folder of a run, with a file `metrics.json` or
            `experts.jsonl` of a `keras_moe.callbacks.ExpertMonitor`, or both. On the
            page, some items of the JSON object `metrics.json` have a place of their
            own: `results`, an object of models, each an object of figures; `tables`, a
            list of objects with `title`, `columns` and `rows`; `findings` and
            `warnings`, lists of text. All others are settings.
        path: str or path, the file to write. Default: `report.html` in the folder. It
            appears whole or not at all.
        title: str, the title of the page. Default: the name of the folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: if `run` is not the folder of a run, or a file in it is damaged.
        ImportError: if there are observations and matplotlib is not installed.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     results = '{"results": {"PLE": {"auc": 0.75}}}'
    ...     size = (Path(folder) / "metrics.json").write_text(results)
    ...     page = keras_moe.report(folder).read_text()
    >>> "PLE" in page and "0.75" in page
    True
    """
    found = read_run(_checks.path("run", run))
    out = found.folder / "report.html" if path is None else _checks.path("path", path)
    if found.observations and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "the pictures of a report need matplotlib: run `pip install matplotlib`"
        )
    title = _checks.optional_text("title", title)
    name = f"Report of {found.folder.resolve().name}" if title is None else title
    page = _page(name, _sections(found))
    with _files.atomic_write(out, overwrite=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _page(title: str, sections: Iterator[tuple[str, str]]) -> str:
    body = "\n".join(
        f"<section><h2>{escape(name)}</h2>\n{content}\n</section>"
        for name, content in sections
        if content
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _sections(run: Run) -> Iterator[tuple[str, str]]:
    record = run.record
    results = record.get("results")
    has_table = isinstance(results, dict) and all(
        isinstance(of_model, dict) for of_model in results.values()
    )
    yield "Results", _results(results or {}) if has_table else ""
    for table in run.tables:
        yield table["title"], _table(table["rows"], table["columns"])
    yield "Findings", "".join(f"<p>{escape(str(text))}</p>" for text in run.findings)
    warned = record.get("warnings") or []
    yield "Warnings", "".join(_alarm(str(text)) for text in warned)
    if run.observations:
        yield "Alarms", _alarms(run.observations)
        yield "Experts", _experts(run.observations)
    yield (
        "Pictures of the run",
        "".join(
            _figure(_pictures.of_file(path), path.stem.replace("_", " "))
            for path in run.pictures
        ),
    )
    elsewhere = ["crc32", "curves", "tables", "findings"] + ["results"] * has_table
    settings = {k: v for k, v in record.items() if k not in elsewhere}
    yield "Settings", _settings(settings)
    yield "Versions of this page", _table(_versions())


def _results(results: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(key for v in results.values() for key in v))
    return _table(
        [[name, *(v.get(column) for column in columns)] for name, v in results.items()],
        ["", *columns],
    )


def _alarms(observations: list[dict[str, Any]]) -> str:
    """Return what looks wrong in the last observation."""
    last = observations[-1]
    signs = [
        sign
        for name, figures in last["mixtures"].items()
        for sign in signs_of_collapse(
            name, figures["gates"], figures, figures.get("top_k")
        )
    ]
    if not signs:
        return "<p>None: no sign of collapse in the last observation.</p>"
    return "".join(_alarm(f"{sign.kind}: {sign.text}") for sign in signs)


def _alarm(text: str) -> str:
    return f'<p class="alarm">{escape(text)}</p>'


def _experts(observations: list[dict[str, Any]]) -> str:
    last = observations[-1]
    parts = [
        _table(
            [
                [
                    name,
                    ", ".join(figures["gates"]),
                    len(figures["load"]),
                    figures["relative_usage"].min(),
                    figures["load_cv"],
                    figures["largest_weight"].mean(),
                    figures["entropy"].mean(),
                ]
                for name, figures in last["mixtures"].items()
            ],
            [
                "mixture",
                "gates",
                "experts",
                "least used (1: even)",
                "load: spread",
                "largest weight",
                "entropy (1: even)",
            ],
        )
    ]
    for caption, picture in _pictures.of_experts(observations):
        parts.append(_figure(picture, caption))
    return "\n".join(parts)


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    flat = {k: v for k, v in settings.items() if not isinstance(v, dict | list)}
    nested = {k: v for k, v in settings.items() if k not in flat}
    parts = [_table([[name, value] for name, value in flat.items()])] if flat else []
    for name, value in nested.items():
        text = escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        parts.append(
            f"<details><summary>{escape(str(name))}</summary><pre>{text}</pre></details>"
        )
    return "\n".join(parts)


def _versions() -> list[list[Any]]:
    rows = []
    for package in _PACKAGES:
        try:
            rows.append([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            continue
    return rows


def _table(rows: list[list[Any]], head: list[str] | None = None) -> str:
    cells = [[_cell(value) for value in row] for row in rows]
    top = "".join(
        f"<th{_NUMERIC if _is_numeric(column) else ''}>{escape(str(name))}</th>"
        for name, *column in zip(head or [], *cells, strict=False)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _is_numeric(column: list[str]) -> bool:
    return any(f"<td{_NUMERIC}>" in cell for cell in column)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "<td>-</td>"
    if isinstance(value, bool | str):
        kind = _NUMERIC if _NUMBER.match(str(value)) else ""
        return f"<td{kind}>{escape(str(value))}</td>"
    if isinstance(value, dict) and {"mean", "standard_deviation"} <= value.keys():
        text = f"{value['mean']:.4g} ± {value['standard_deviation']:.2g}"
        return f"<td{_NUMERIC}>{escape(text)}</td>"
    if not isinstance(value, int | float):
        return f"<td>{escape(json.dumps(value, default=str))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"<td{_NUMERIC}>{escape(text)}</td>"


def _figure(source: str, caption: str) -> str:
    text = escape(caption)
    return (
        f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption>'
        "</figure>"
    )
