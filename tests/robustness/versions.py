"""The core of the suite with the oldest and the newest Keras and TensorFlow.

    python -m tests.robustness.versions --json versions.json
    python -m tests.robustness.versions --quick --python 3.12 --json versions.json
    python -m tests.robustness.versions page versions.json

For each Python that is found, two environments are made: the oldest releases that
pyproject.toml allows and the interpreter has wheels of, and the newest. The core is
what runs on TensorFlow alone: layers, routers, dispatches, experts, losses, metrics,
optimizers, several tasks, files and SavedModels; with `--quick` a part of it. `page`
writes the table of the JSON file into docs/project.md. What runs again replaces its
line of the JSON file.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from tests.robustness import results
from tests.robustness.results import Tried

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "project.md"
BEGIN, END = "<!-- versions: written by a command -->", "<!-- versions: end -->"
MINORS = ("3.11", "3.12", "3.13", "3.14")
PINNED = ("keras", "tensorflow", "numpy")
TOOLS = (
    *("pytest", "pytest-xdist", "hypothesis", "tensorflow-serving-api"),
    *("scikit-learn", "scipy"),  # oracles
)
FOLDERS = ("layers", "routers", "metrics", "multitask", "optimizers")
FILES = (
    *("dispatch", "experts", "export", "export_ids", "export_serving", "grow"),
    *("initializers", "keras_habits", "losses", "old_files", "remat", "routing"),
    *("serving", "upcycling"),
)
CORE = (
    *(f"tests/{folder}" for folder in FOLDERS),
    *(f"tests/test_{name}.py" for name in FILES),
)
QUICK = (
    *(f"tests/layers/test_{name}.py" for name in ("saved_model", "moe_dispatch")),
    *(f"tests/routers/test_{name}.py" for name in ("every_router", "oracle")),
    *(f"tests/multitask/test_{name}.py" for name in ("model", "dbmtl")),
    "tests/optimizers/test_optimizers_in_models.py",
    *(f"tests/test_{name}.py" for name in ("dispatch", "experts", "export_ids")),
    *(f"tests/test_{name}.py" for name in ("export_serving", "losses", "routing")),
    *(f"tests/test_{name}.py" for name in ("old_files", "upcycling")),
)
# Formats with runtimes of their own, which have other lower bounds.
FORMATS = "not onnx and not litert and not openvino"
WHAT = "Python {python}, Keras {keras}, TensorFlow {tensorflow}, NumPy {numpy}"


def interpreters() -> dict[str, str]:
    """Return the interpreters on the path, and those of pyenv, by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {}
    for minor in MINORS:
        places = [shutil.which(f"python{minor}") or ""]
        places += map(str, sorted(pyenv.glob(f"{minor}.*/bin/python{minor}")))
        for place in filter(None, places):
            if _output(place, "-c", "print(1)") is not None:
                found[minor] = place
                break
    return found


def releases(python: str, name: str) -> list[tuple[int, ...]]:
    """Return the releases that pip lists, the oldest first."""
    listed = _output(
        *(python, "-m", "pip", "index", "versions", name, "--only-binary=:all:")
    )
    found = re.search(r"Available versions: (.*)", listed or "")
    if not found:
        raise RuntimeError(f"{python}: pip lists no releases of {name}")
    texts = [text.strip() for text in found.group(1).split(",")]
    return sorted(
        tuple(map(int, text.split(".")))
        for text in texts
        if re.fullmatch(r"[\d.]+", text)
    )


def lower_bounds() -> dict[str, tuple[int, ...]]:
    """Return the lower bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = (re.match(r"(\w+)>=([\d.]+)", each) for each in project["dependencies"])
    return {m.group(1): tuple(map(int, m.group(2).split("."))) for m in found if m}


def oldest(python: str) -> list[str]:
    """Return requirements of the oldest allowed releases."""
    bounds = lower_bounds()
    wanted = []
    for name in PINNED:
        allowed = [
            f"{name}=={'.'.join(map(str, release))}"
            for release in releases(python, name)
            if release >= bounds[name]
        ]
        wanted.append(next(each for each in allowed if _has_wheel(python, each)))
    return wanted


def _has_wheel(python: str, requirement: str) -> bool:
    """Whether it can be installed: pip also lists releases for other interpreters."""
    options = ("--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:")
    return _output(python, "-m", "pip", "install", *options, requirement) is not None


def try_environment(
    python: str, requirements: Sequence[str], tests: Sequence[str], jobs: int
) -> Tried:
    """Make an environment, run tests in it, and remove it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own, report = str(Path(folder, "bin", "python")), Path(folder, "report.xml")
        install = (own, "-m", "pip", "install", "-q", "--only-binary=:all:")
        done = _run(*install, *requirements, *TOOLS)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            given = dict(text.split("==") for text in requirements if "==" in text)
            versions = {name: given.get(name, "newest") for name in PINNED}
            what = WHAT.format(python=_python_version(own), **versions)
            return Tried(what, 1, 0, "they install", reason)
        # Tests that start a process without this folder import the packages too.
        (packages,) = Path(folder).glob("lib/python*/site-packages")
        (packages / "tree.pth").write_text(f"{ROOT}\n")
        versions = {name: _version(own, name) for name in PINNED}
        what = WHAT.format(python=_python_version(own), **versions)
        print(what, flush=True)
        done = _run(
            *(own, "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider"),
            *("-k", FORMATS, f"--junitxml={report}", *tests),
        )
        print(done.stdout[-6000:], flush=True)
        return summary(what, report)


def summary(what: str, report: Path) -> Tried:
    """Return the line of a run, from the report of pytest."""
    if not report.exists():
        return Tried(what, 1, 0, "the tests run", "pytest wrote no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    tried = len(cases) - len(skipped)
    note = f"{len(skipped)} skipped"
    if failed:
        note += f"; failed: {', '.join(failed[:20])}"
    return Tried(what, tried, tried - len(failed), "the tests pass", note)


def table(tried: Sequence[Tried]) -> str:
    """Return the table of docs/project.md."""
    lines = [
        "| Python | Keras | TensorFlow | NumPy | tests passed |",
        "|---|---|---|---|---|",
    ]
    for line in tried:
        columns = [part.split(" ", 1)[1] for part in line.what.split(", ")]
        passed = f"{line.survived:,} of {line.cases:,}"
        lines.append(f"| {' | '.join([*columns, passed])} |")
    return "\n".join(lines)


def write_table(page: Path, tried: Sequence[Tried]) -> None:
    """Replace the table between the markers of a page.

    Raises:
        ValueError: if the page does not have the markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} must have the lines {BEGIN!r} and {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(tried)}\n{END}{after}")


def _python_version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return (_output(python, "-c", code) or "unknown").strip()


def _version(python: str, name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return (_output(python, "-c", code) or "unknown").strip()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    # The tests import the packages of this folder, in the environment's interpreter.
    env = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONHOME")
    }
    env |= {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )


def _output(*command: str) -> str | None:
    done = _run(*command)
    return None if done.returncode else done.stdout


def main() -> None:
    """Run the command of the first lines of this file."""
    parser = argparse.ArgumentParser(description="The suite on other versions.")
    parser.add_argument("command", nargs="*", help="`page FILE`: write the table")
    parser.add_argument("--python", nargs="+", default=None, help="such as 3.12")
    parser.add_argument("--ends", nargs="+", default=["oldest", "newest"])
    parser.add_argument("--quick", action="store_true", help="a part of the core")
    parser.add_argument("--jobs", type=int, default=1, help="processes of pytest")
    parser.add_argument("--json", type=Path, default=Path("versions.json"))
    options = parser.parse_args()
    if options.command:
        name, *files = options.command
        if name != "page" or len(files) != 1:
            parser.error("the command must be `page FILE`")
        write_table(PAGE, results.read(Path(files[0]))[2])
        return
    command = "python -m tests.robustness.versions"
    tried = results.read(options.json)[2] if options.json.exists() else []
    found = interpreters()
    for minor in options.python or found:
        if minor not in found:
            parser.error(f"Python {minor} is not found; found: {', '.join(found)}")
        for end in options.ends:
            wanted = list(PINNED) if end == "newest" else oldest(found[minor])
            line = try_environment(
                *(found[minor], wanted, QUICK if options.quick else CORE, options.jobs)
            )
            print(line, flush=True)
            tried = [each for each in tried if each.what != line.what] + [line]
            tried.sort(key=lambda each: each.what)
            results.write(options.json, "versions", command, tried)


if __name__ == "__main__":
    main()
