"""Notebooks agree with their scripts, run, and report figures of their outputs."""

import re

import nbformat
import pytest

from notebooks import build

SCRIPTS = [pytest.param(path, id=path.stem) for path in build.scripts()]
# A figure is a number with a point or a comma, a percentage, or of two or more digits.
FIGURE = re.compile(r"\d[\d,]*\.\d+|\d[\d,]*\d|\d+(?=%)")


def _kept(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def _outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def _printed(notebook):
    return "".join(output.get("text", "") for output in _outputs(notebook))


def test_there_are_nine():
    numbers = [int(path.name[:2]) for path in build.scripts()]
    assert numbers == list(range(1, 10))


@pytest.mark.parametrize("script", SCRIPTS)
def test_notebook_has_the_cells_of_its_script(script):
    kept, made = _kept(script), build.read(script)
    assert [(c.cell_type, c.source) for c in kept.cells] == [
        (c.cell_type, c.source) for c in made.cells
    ]
    assert kept.metadata == made.metadata


@pytest.mark.parametrize("script", SCRIPTS)
def test_outputs_are_clean_and_in_order(script):
    kept = _kept(script)
    nbformat.validate(kept)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for output in _outputs(kept)}
    assert kinds == {"stream", "display_data"}
    assert {o.name for o in _outputs(kept) if o.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in o.get("data", {}) for o in _outputs(kept)) >= 2
    assert "\r" not in _printed(kept)
    assert not re.search(r"(?:^|\s|['\"])/\w+/", _printed(kept)), "a path"
    assert script.with_suffix(".ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_of_the_last_cell_are_in_the_outputs(script):
    kept = _kept(script)
    last = kept.cells[-1]
    assert last.source.startswith("## Results")
    reported = FIGURE.findall(last.source)
    assert len(reported) >= 5
    printed = set(FIGURE.findall(_printed(kept)))
    assert [figure for figure in reported if figure not in printed] == []


def test_figures_of_the_page_are_in_the_outputs_of_the_notebooks_it_names():
    """Those of MovieLens are in the example's README."""
    root = build.FOLDER.parent
    page = (root / "docs" / "does-sparse-moe-pay.md").read_text()
    example = (root / "recsys_examples" / "movielens" / "README.md").read_text()
    names = set(re.findall(r"notebooks/(\w+)\.ipynb", page))
    assert len(names) == 4
    kept = [_kept(build.FOLDER / name) for name in names]
    printed = set(FIGURE.findall("".join([example, *map(_printed, kept)])))
    prose = re.sub(r"\]\([^)]*\)|https?://\S+|```.*?```", "", page, flags=re.DOTALL)
    reported = FIGURE.findall(prose)
    assert len(reported) >= 30
    assert [figure for figure in reported if figure not in printed] == []


@pytest.fixture(scope="module")
def small_runs():
    """Run all with small settings, in one kernel: TensorFlow is imported once."""
    made = {script: build.read(script) for script in build.scripts()}
    cells = []
    for notebook in made.values():
        cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    build.execute(nbformat.v4.new_notebook(cells=cells), quick=True)
    return made


@pytest.mark.parametrize("script", SCRIPTS)
def test_notebook_runs_with_small_settings(script, small_runs):
    made, kept = small_runs[script], _kept(script)
    assert [[o.output_type for o in c.get("outputs", ())] for c in made.cells] == [
        [o.output_type for o in c.get("outputs", ())] for c in kept.cells
    ]


@pytest.mark.parametrize(
    ("stream", "text", "rule"),
    [
        ("stderr", "UserWarning: careful", "not write to stderr"),
        ("stdout", "WARNING:tensorflow:careful", "not log a warning"),
        ("stdout", f"written to {build.FOLDER / 'model'}", "not contain the path"),
    ],
)
def test_invalid_outputs_raise(stream, text, rule):
    output = nbformat.v4.new_output("stream", name=stream, text=text)
    with pytest.raises(ValueError, match=rule):
        build.check_outputs(nbformat.v4.new_code_cell(outputs=[output]))


def test_outputs_are_only_taken_for_the_same_code():
    script = build.scripts()[0]
    made, path = build.read(script), script.with_suffix(".ipynb")
    assert _outputs(build.take_outputs(made, path)) == _outputs(_kept(script))
    made.cells[1].source += "\n"
    with pytest.raises(ValueError, match="has changed"):
        build.take_outputs(made, path)
