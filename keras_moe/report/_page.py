"""One self-contained HTML page: figures, tables, alarms, settings and versions."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from keras_moe import _checks, _files
from keras_moe.report import _alarms as _signs
from keras_moe.report import _pictures
from keras_moe.report._names import PAGE
from keras_moe.report._run import Run, read_run

_PACKAGES = ("keras-moe", "keras", "tensorflow", "jax", "torch", "numpy")
_NUMERIC = ' class="number"'
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?([ %([]|$)")
_STYLE = """
:root { color-scheme: light dark; --line: #bbb; --soft: #f2f2f2; --warn: #a33;
  --shadow: #0006; }
@media (prefers-color-scheme: dark) {
  :root { --line: #555; --soft: #2a2a2a; --warn: #f99; --shadow: #fff6; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; scrollbar-width: thin;
  /* A shadow where a part is hidden: the covers scroll with the table. */
  background: linear-gradient(to right, Canvas 1rem, transparent 2.5rem) local,
    linear-gradient(to left, Canvas 1rem, transparent 2.5rem) local,
    linear-gradient(to right, var(--shadow), transparent 1rem) scroll,
    linear-gradient(to left, var(--shadow), transparent 1rem) scroll; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0;
  text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.long { display: inline-block; min-width: 11rem; }
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
            `warnings`, lists of text; `curves`, an object of lists with one number an
            epoch, such as `history.history`. All others are settings, but for `crc32`,
            a checksum of the file.
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
    out = found.folder / PAGE if path is None else _checks.path("path", path)
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
    curves = record.get("curves")
    has_curves = isinstance(curves, dict) and all(
        isinstance(curve, list) for curve in curves.values()
    )
    yield "Results", _results(results or {}) if has_table else ""
    for table in run.tables:
        yield table["title"], _table(table["rows"], table["columns"])
    yield "Findings", "".join(f"<p>{escape(str(text))}</p>" for text in run.findings)
    yield "Warnings", "".join(_alarm(str(text)) for text in run.warnings)
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
    yield "Curves", _curves(curves) if has_curves and curves else ""
    elsewhere = ["crc32", "tables", "findings", "warnings"]
    elsewhere += ["results"] * has_table + ["curves"] * has_curves
    settings = {k: v for k, v in record.items() if k not in elsewhere}
    yield "Settings", _settings(settings)
    yield "Versions of this page", _table(_versions())


def _results(results: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(key for v in results.values() for key in v))
    return _table(
        [[name, *(v.get(column) for column in columns)] for name, v in results.items()],
        ["", *columns],
    )


def _curves(curves: dict[str, list[Any]]) -> str:
    """Return a table with a row an epoch, folded."""
    epochs = max(map(len, curves.values()))
    rows = [
        [epoch + 1, *(c[epoch] if epoch < len(c) else None for c in curves.values())]
        for epoch in range(epochs)
    ]
    table = _table(rows, ["epoch", *curves])
    return f"<details><summary>{epochs} epochs</summary>{table}</details>"


def _alarms(observations: list[dict[str, Any]]) -> str:
    """Return what looks wrong, in the last observation and before."""
    found = _signs.alarms(observations)
    now = [_alarm(alarm.text) for alarm in found if alarm.is_last]
    before = [_alarm(alarm.text) for alarm in found if not alarm.is_last]
    hidden = _signs.too_small(observations[-1])
    notes = [f"<p>{escape(line)}</p>" for line in hidden]
    if not found:
        what = "that the sample can show, " if hidden else ""
        number = len(observations)
        seen = f"{number} observations" if number > 1 else "one observation"
        return f"<p>No sign of collapse {what}in {seen}.</p>" + "".join(notes)
    if not now:
        now = ["<p>None in the last observation.</p>"]
    if before:
        before.insert(0, "<p>Earlier, not in the last observation:</p>")
    return "".join([*now, *before, *notes])


def _alarm(text: str) -> str:
    return f'<p class="alarm">{escape(text)}</p>'


def _experts(observations: list[dict[str, Any]]) -> str:
    mixtures = observations[-1]["mixtures"]
    columns = {
        title: [figure(name, figures) for name, figures in mixtures.items()]
        for title, figure in _COLUMNS.items()
    }
    shown = {
        title: values
        for title, values in columns.items()
        if title not in _IF_KNOWN or any(value is not None for value in values)
    }
    rows = [list(row) for row in zip(*shown.values(), strict=True)]
    parts = [_table(rows, list(shown))]
    for caption, picture in _pictures.of_experts(observations):
        parts.append(_figure(picture, caption, _pictures.WIDTH))
    return "\n".join(parts)


def _dropped(name: str, figures: dict[str, Any]) -> Any:
    is_router = figures["gates"] == ("router",)
    return figures.get("dropped") if is_router else None


def _zeros(name: str, figures: dict[str, Any]) -> Any:
    zeros = figures.get("zero_activations")
    return None if zeros is None or not len(zeros) else zeros.mean()


# The largest share of an expert in any gate over an even share can be above 1 for all
# experts, if each is preferred by some gate.
_COLUMNS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "mixture": lambda name, _: name,
    "gates": lambda _, figures: ", ".join(figures["gates"]),
    "experts": lambda _, figures: len(figures["load"]),
    "rows": lambda _, figures: figures["rows"],
    "least used expert: its largest share in a gate (1: even share)": (
        lambda _, figures: figures["relative_usage"].min()
    ),
    "load: spread": lambda _, figures: figures["load_cv"],
    "largest weight": lambda _, figures: figures["largest_weight"].mean(),
    "entropy (1: even)": lambda _, figures: figures["entropy"].mean(),
    "dropped choices": _dropped,
    "zeros in hidden units": _zeros,
}
_IF_KNOWN = ("dropped choices", "zeros in hidden units")


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
        f"<th{_NUMERIC if _is_numeric(column) else ''}>{_heading(str(name))}</th>"
        for name, *column in zip(head or [], *cells, strict=False)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _heading(name: str) -> str:
    # A column of short figures would break a long name into single words.
    text = escape(name)
    return f'<span class="long">{text}</span>' if len(name) > 30 else text


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


def _figure(source: str, caption: str, width: int | None = None) -> str:
    text = escape(caption)
    size = "" if width is None else f' width="{width}"'
    return (
        f'<figure><img src="{source}" alt="{text}"{size}><figcaption>{text}'
        "</figcaption></figure>"
    )
