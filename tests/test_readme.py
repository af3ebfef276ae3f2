"""What the README shows runs, and what it names exists."""

import importlib.util
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


SWAPS = {
    "SharedBottom": "SharedBottom((32, 16), tasks=TASKS)",
    "OMoE": "OMoE(num_experts=4, expert_units=(32, 16), tasks=TASKS)",
    "MMoE": "MMoE(num_experts=4, expert_units=(32, 16), tasks=TASKS, top_k=2)",
    "PLE": "PLE(num_levels=2, num_shared_experts=1, num_task_experts=1, "
    "expert_units=(32, 16), tasks=TASKS)",
    "CGC": "CGC(num_shared_experts=1, num_task_experts=1, expert_units=(32, 16), "
    "tasks=TASKS)",
    "AdaTT": "AdaTT(num_levels=2, num_task_experts=1, expert_units=(32, 16), "
    "tasks=TASKS)",
    "HoME": "HoME(num_shared_experts=1, num_task_experts=1, expert_units=(32, 16), "
    "tasks=TASKS)",
    "CrossStitch": "CrossStitch((32, 16), tasks=TASKS)",
    "DSelectK": "DSelectK(num_experts=4, expert_units=(32, 16), tasks=TASKS)",
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_layer_swaps_for_another_in_a_line(name):
    line = f"shared = {SWAPS[name]}(inputs)".replace("TASKS", '["click", "stars"]')
    code = re.sub("^shared = .*$", line, _examples()[0], flags=re.MULTILINE)
    code = code.replace("import MMoE, Tower", f"import {name}, Tower")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"].layers[1]).__name__ == name


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


def test_it_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m ([\w.]+)", README)) - {"pytest"})
)
def test_commands_exist(module):
    assert importlib.util.find_spec(module) or module == "sphinx"


def test_ci_runs_the_command_of_the_readme():
    """`.ci/run` finds the command by its form, so the README must keep it."""
    commands = re.findall(r"^pip install .* && python -m pytest$", README, re.MULTILINE)
    assert len(commands) == 1
