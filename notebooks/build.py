"""Builds and executes the notebooks: `python -m notebooks.build`.

The source is a script in jupytext's percent format. The `.ipynb` file is generated,
without metadata that depends on the run or the machine, such as times.
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
    # Messages of TensorFlow's C++ code go to the terminal, not into a cell.
    "--IPKernelApp.capture_fd_output=False",
    # In a notebook TensorFlow logs to stdout from INFO, such as the paths of exports.
    "--IPKernelApp.exec_lines=__import__('tensorflow').get_logger().setLevel('ERROR')",
]
_CELL_TIMEOUT = 3600  # seconds
_MAX_BYTES = 400_000  # of a file


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
    """Execute a notebook in a new kernel; return it with its outputs.

    Args:
        notebook: the notebook, see `read`.
        quick: whether to run with small settings.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        ValueError: if an output is invalid, see `check_outputs`.
    """
    client = NotebookClient(
        notebook,
        timeout=_CELL_TIMEOUT,
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
    """Copy the outputs of a file with the same code into a notebook.

    Raises:
        ValueError: if a code cell differs.
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
    """Check that outputs contain no warnings and no local paths.

    Raises:
        ValueError: if the cell wrote to stderr or logged a warning, or if an output
            contains a path of this machine.
    """
    places = {str(FOLDER.parent), str(Path.home()), tempfile.gettempdir()} - {"/"}
    for output in cell.get("outputs", ()):
        if output.get("name") == "stderr":
            raise ValueError(f"a cell must not write to stderr; got:\n{output.text}")
        shown = output.get("text") or output.get("data", {}).get("text/plain", "")
        if "WARNING:" in shown:
            raise ValueError(f"a cell must not log a warning; got:\n{shown}")
        for place in places:
            if place in shown:
                raise ValueError(
                    f"an output must not contain the path {place}; got:\n{shown}"
                )


def write(notebook: NotebookNode, path: Path) -> None:
    """Write an executed notebook.

    Raises:
        ValueError: if the file would be too large for the repository.
    """
    text = nbformat.writes(nbformat.from_dict(notebook)) + "\n"
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"{path.name} must have at most {_MAX_BYTES} bytes; got {len(text)}"
        )
    path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.build",
        description="Build and execute the notebooks.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="prefixes of the names of scripts, such as 01 (default: all)",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="only text has changed: keep the outputs and execute nothing",
    )
    options = parser.parse_args(arguments)
    names = tuple(options.names) or ("",)
    chosen = [path for path in scripts() if path.name.startswith(names)]
    if not chosen:
        parser.error(f"names must be prefixes of scripts; got {list(names)}")
    for script in chosen:
        started = time.perf_counter()
        path = script.with_suffix(".ipynb")
        made = read(script)
        write(take_outputs(made, path) if options.text else execute(made), path)
        seconds = time.perf_counter() - started
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
