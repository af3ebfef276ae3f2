"""The wheel: all modules, usable without the repository, with types for mypy."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import keras
import pytest

from tests.support import processes

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the same wheel for all backends"
)

USER = """
import keras
import keras_moe
from keras_moe.layers import MMoE, MoE

shared = MMoE(num_experts=2, expert_units=4, tasks=["click", "stars"])
reveal_type(shared.tasks)
reveal_type(shared.num_experts)
reveal_type(keras_moe.export.export_model)
MoE(num_experts=2, expert_units=4, dispatch=3)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # Without the build folder and the caches that a checkout may have.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    arguments = ["--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = processes.run(["-m", "build", *arguments], cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60
    )
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        str(path.relative_to(ROOT))
        for package in ("keras_moe", "recsys_examples")
        for path in (ROOT / package).rglob("*.py")
    }
    page = {
        f"recsys_examples/movielens/web/page.{kind}" for kind in ("css", "html", "js")
    }
    assert held == modules | page | {"keras_moe/py.typed"}


@pytest.mark.parametrize(
    "command",
    [
        "movielens",
        "census_income",
        "click_conversion",
        "ray_workers",
        "task_correlation",
        "two_stage",
    ],
)
def test_the_commands_of_the_examples_are_in_the_wheel(command, environment, tmp_path):
    arguments = ["-m", f"recsys_examples.{command}", "--help"]
    done = processes.run(arguments, cwd=tmp_path, python=environment / "bin/python")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python -m recsys_examples.{command}" in done.stdout


def test_the_wheel_is_imported_without_the_repository(environment, tmp_path):
    code = (
        "import keras_moe, numpy as np; print(keras_moe.__file__); "
        "print(keras_moe.layers.MoE(2, 3)(np.ones((4, 5))).shape)"
    )
    done = processes.run(["-c", code], cwd=tmp_path, python=environment / "bin/python")
    assert done.returncode == 0, done.stderr[-2000:]
    file, shape = done.stdout.splitlines()[-2:]
    assert file.startswith(str(environment))
    assert shape == "(4, 3)"


def test_mypy_of_a_user_reads_the_types(environment, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    done = processes.run(
        [
            "-m",
            "mypy",
            "--python-executable",
            str(environment / "bin/python"),
            "--ignore-missing-imports",
            "--cache-dir",
            str(tmp_path / "cache"),
            "user.py",
        ],
        cwd=tmp_path,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    assert len(lines) == 4, done.stdout
    assert 'Revealed type is "tuple[Any, ...]"' in lines[0]
    assert 'Revealed type is "int"' in lines[1]
    assert "path: str | pathlib.Path" in lines[2].replace(
        "Union[str, pathlib.Path]", ""
    )
    assert '"dispatch" to "MoE"' in lines[3]
    assert "expected" in lines[3]
