"""What the README shows runs, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


def test_the_first_example_runs_and_is_short():
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len(code.splitlines()) <= 35
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    predictions = names["model"].predict(names["x"], verbose=0)
    assert {task: p.shape for task, p in predictions.items()} == {
        "click": (256, 1),
        "stars": (256, 1),
    }


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
