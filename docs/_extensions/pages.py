"""Pages whose source is elsewhere in the repository, and a check of the API.

The results are the READMEs of `recsys_examples`, the notebooks those of `notebooks`,
and the changelog and the rules for contributors the files of the root. They are written
into `docs/generated/`, which git ignores. A public name without a docstring is a
warning, which fails a build with `-W`.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
STUDIES = (
    "movielens",
    "two_stage",
    "census_income",
    "task_correlation",
    "click_conversion",
)
MODULES = (
    "layers",
    "multitask",
    "multitask.heads",
    "multitask.weighting",
    "multitask.gradients",
    "routers",
    "experts",
    "dispatch",
    "routing",
    "losses",
    "metrics",
    "callbacks",
    "telemetry",
    "optimizers",
    "initializers",
    "upcycling",
    "convert",
    "distribution",
    "export",
    "plots",
    "report",
    "tfrs",
)


def setup(app: Any) -> dict[str, bool]:
    """Write the pages before Sphinx looks for them."""
    app.connect("builder-inited", _build)
    app.connect("source-read", _lead_to_pages)
    return {"parallel_read_safe": True}


def _build(app: Any) -> None:
    from sphinx.util import logging

    for problem in undocumented():
        logging.getLogger(__name__).warning(problem)
    for path, content in generated().items():
        _write(Path(app.srcdir) / path, content)


# Links out of `docs/`, which lead somewhere where the sources are read as well.
_OUTSIDE = (
    (r"recsys_examples/(\w+)/README\.md", r"generated/\1.md"),
    (r"recsys_examples/(\w+)/figures/(\w+\.png)", r"generated/\1/\2"),
    (r"notebooks/(\w+)\.ipynb", r"generated/\1.md"),
    (r"CONTRIBUTING\.md", "generated/contributing.md"),
    (r"CHANGELOG\.md", "generated/changelog.md"),
)


def _lead_to_pages(app: Any, name: str, source: list[str]) -> None:
    """Make links to other files of the repository links to the pages made of them."""
    above = "../" * (name.count("/") + 1)
    for outside, page in _OUTSIDE:
        link = f"]({above.removeprefix('../')}{page})"
        pattern = rf"\]\({re.escape(above)}{outside}\)"
        source[0] = re.sub(pattern, link, source[0])


def _write(path: Path, content: str | bytes) -> None:
    """Write a file unless it has this content already: Sphinx reads by date."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def generated() -> dict[str, str | bytes]:
    """Return the content of every generated file by its path in `docs/`."""
    made: dict[str, str | bytes] = {}
    for study in STUDIES:
        made |= _study(study)
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        made |= _notebook(path)
    made["generated/contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text()
    made["generated/changelog.md"] = (ROOT / "CHANGELOG.md").read_text()
    return made


def _study(name: str) -> dict[str, str | bytes]:
    folder = ROOT / "recsys_examples" / name
    made: dict[str, str | bytes] = {
        f"generated/{name}/{picture.name}": picture.read_bytes()
        for picture in sorted((folder / "figures").glob("*.png"))
    }

    def moved(found: re.Match[str]) -> str:
        text, target = found.groups()
        if "://" in target:
            return found.group()
        if target.startswith("figures/"):
            return f"[{text}]({name}/{Path(target).name})"
        if target.endswith("/README.md"):
            return f"[{text}]({Path(target).parent.name}.md)"
        # A file of the source has no page: its address in the repository.
        return f"`recsys_examples/{name}/{target}`"

    text = (folder / "README.md").read_text()
    made[f"generated/{name}.md"] = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", moved, text)
    return made


def _notebook(path: Path) -> dict[str, str | bytes]:
    """Return the page of a notebook and its pictures."""
    made: dict[str, str | bytes] = {}
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                text = "".join(output["text"]).rstrip()
                parts.append(f"```text\n{text}\n```")
            else:
                picture = f"{path.stem}/{len(made) + 1}.png"
                image = "".join(output["data"]["image/png"])
                made[f"generated/{picture}"] = base64.b64decode(image)
                parts.append(f"![output of the cell above]({picture})")
    return {f"generated/{path.stem}.md": "\n\n".join(parts) + "\n", **made}


def undocumented() -> list[str]:
    """Return a line for each public name that the pages of the API lack."""
    problems = []
    for name in MODULES:
        module = importlib.import_module(f"keras_moe.{name}")
        page = (ROOT / "docs" / "api" / f"{name}.md").read_text()
        for public in public_names(module):
            thing = getattr(module, public)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                described = bool(thing.__doc__) and thing.__name__ == public
            else:
                described = False
            # The page itself says what a constant or an alias is.
            if not described and f"`{public}`" not in page:
                problems.append(f"keras_moe.{name}.{public} has no docstring")
    return problems


def public_names(module: Any) -> list[str]:
    """Return the names in `__all__`, or else those that the module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and _home(thing) == module.__name__
    ]


def _home(thing: Any) -> str:
    return getattr(thing, "__module__", "")
