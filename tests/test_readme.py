"""What the README shows runs, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


def _examples():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs_and_is_short():
    code = _examples()[0]
    assert len(code.splitlines()) <= 20
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    predictions = names["model"].predict(names["x"], verbose=0)
    assert {task: p.shape for task, p in predictions.items()} == {
        "click": (256, 1),
        "stars": (256, 1),
    }


SWAPS = next(c for c in _examples() if "PLE(" in c).splitlines()


@pytest.mark.parametrize("line", SWAPS, ids=lambda line: line.split("(")[0])
def test_a_layer_swaps_for_another_in_a_line(line):
    code = re.sub("^shared = .*$", line, _examples()[0], flags=re.MULTILINE)
    names = "CGC, PLE, AdaTT, CrossStitch, DSelectK, HoME, MMoE, SharedBottom, Tower"
    code = code.replace("import MMoE, Tower", f"import {names}")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"].layers[1]).__name__ in line


def test_the_example_of_the_sparse_mixture_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(c for c in _examples() if "MoE(" in c and "MMoE" not in c)
    assert len(code.splitlines()) <= 15
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].jit_compile
    assert names["model"].optimizer.iterations == 2 * 512 // 64
    assert (tmp_path / "saved_model").exists()


@pytest.mark.parametrize(
    "target",
    [link for link in re.findall(r"\]\(([^)]+)\)", PROSE) if "://" not in link],
)
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_ci_runs_the_command_of_the_readme():
    """`.ci/run` finds the command by its form, so the README must keep it."""
    commands = re.findall(r"^pip install .* && python -m pytest$", README, re.MULTILINE)
    assert len(commands) == 1
