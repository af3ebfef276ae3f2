"""Make the notebooks of their scripts, and run them: `python -m notebooks.build`.

A script in jupytext's percent format is the source; the `.ipynb` beside it is made new
each time, with nothing in it that another run or another machine would change.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
QUICK = "KERAS_MOE_NOTEBOOK_QUICK"
_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OPENBLAS_NUM_THREADS": "1",
    "KERAS_BACKEND": "tensorflow",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
_QUIET_TENSORFLOW = [
    # What it logs below Python goes to the terminal, not into a cell.
    "--IPKernelApp.capture_fd_output=False",
    # In a notebook it logs to stdout, from INFO on: the paths of exports, for one.
    "--IPKernelApp.exec_lines=__import__('tensorflow').get_logger().setLevel('ERROR')",
]
_SECONDS_A_CELL = 600
_LARGEST = 400_000  # bytes of a file


def scripts() -> list[Path]:
    """Return the paths of all scripts, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def read(script: Path) -> NotebookNode:
    """Return the notebook of a script, without outputs."""
    notebook = jupytext.read(script)
    notebook.metadata = NotebookNode(
        kernelspec={
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        language_info={"name": "python"},
    )
    for place, cell in enumerate(notebook.cells, start=1):
        cell.id = f"{script.name[:2]}-{place:02d}"  # unique among all notebooks
        cell.metadata = NotebookNode()
    return notebook


def execute(notebook: NotebookNode, quick: bool = False) -> NotebookNode:
    """Run a notebook in a kernel of its own; return it with its outputs.

    Args:
        notebook: as `read` returns it.
        quick: whether to run with small settings.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        ValueError: if a cell writes to stderr or logs a warning, which is a fault
            here, or if a path of this machine is in an output.
    """
    client = NotebookClient(
        notebook,
        timeout=_SECONDS_A_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER.parent)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=_QUIET_TENSORFLOW,
    )
    client.execute(env={**os.environ, **_ENVIRONMENT, QUICK: "1" if quick else "0"})
    for cell in notebook.cells:
        check_outputs(cell)
    notebook.metadata.language_info = NotebookNode(name="python")
    return notebook


def take_outputs(notebook: NotebookNode, path: Path) -> NotebookNode:
    """Give a notebook the outputs of a file whose code is the same.

    Raises:
        ValueError: if a code cell differs, so that the outputs would not be its own.
    """
    kept = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    made = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.source for cell in kept] != [cell.source for cell in made]:
        raise ValueError(
            f"the code of {path.name} has changed: build it without --text"
        )
    for cell, before in zip(made, kept, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return notebook


def check_outputs(cell: NotebookNode) -> None:
    """Refuse outputs that are not for a reader.

    Raises:
        ValueError: if the cell wrote to stderr or logged a warning, or if a path of
            this machine is in an output.
    """
    places = {str(FOLDER.parent), str(Path.home()), tempfile.gettempdir()} - {"/"}
    for output in cell.get("outputs", ()):
        if output.get("name") == "stderr":
            raise ValueError(f"a cell must write nothing to stderr:\n{output.text}")
        shown = output.get("text") or output.get("data", {}).get("text/plain", "")
        if "WARNING:" in shown:
            raise ValueError(f"a cell must log no warning:\n{shown}")
        for place in places:
            if place in shown:
                raise ValueError(f"an output must not hold the path {place}:\n{shown}")


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook that has been run.

    Raises:
        ValueError: if the file would be too large for a repository.
    """
    text = nbformat.writes(nbformat.from_dict(notebook)) + "\n"
    if len(text) > _LARGEST:
        raise ValueError(
            f"{path.name} must have at most {_LARGEST} bytes. Received: {len(text)}"
        )
    path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.build", description="Make and run the notebooks."
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="beginnings of the scripts' names, such as 01 (default: all)",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="only the text has changed: keep the outputs, run nothing",
    )
    options = parser.parse_args(arguments)
    names = tuple(options.names) or ("",)
    chosen = [path for path in scripts() if path.name.startswith(names)]
    if not chosen:
        parser.error(f"no script begins with {list(names)}")
    for script in chosen:
        started = time.perf_counter()
        path = script.with_suffix(".ipynb")
        made = read(script)
        write(take_outputs(made, path) if options.text else execute(made), path)
        seconds = time.perf_counter() - started
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
