"""The Python environments of the cases: the running one, and one for each peer.

`python -m tests.benchmarks setup` makes them in `.benchmarks/`, which git ignores, with
uv if it is installed, else with venv and pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".benchmarks"
OWN = "own"


@dataclass(frozen=True)
class Environment:
    """Pinned requirements of an environment.

    Attributes:
        requirements: installed with their dependencies.
        alone: installed afterwards, without dependencies: their own pins forbid
            versions with which they work.
    """

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()


ENVIRONMENTS = {
    # DeepCTR pins h5py 3.7.0, for which Python 3.11 has no wheel.
    "deepctr": Environment(
        ("tensorflow==2.21.0", "keras==3.15.1", "requests==2.34.2"),
        alone=("deepctr==0.9.4",),
    ),
    "torch": Environment(
        (
            "torch==2.13.0",
            "torch-rechub==0.9.0",
            "transformers==5.24.0",
            "st-moe-pytorch==0.1.8",
            "mixture-of-experts==0.2.3",
        )
    ),
    # tf_keras is Keras 2, a peer of its own.
    "keras_hub": Environment(
        (
            "tensorflow==2.21.0",
            "keras==3.15.1",
            "keras-hub==0.32.0",
            "tf_keras==2.21.0",
        )
    ),
    # The compiler of a TPU, which needs no TPU: `tests.benchmarks.accelerators`.
    "tpu": Environment(("libtpu==0.0.42.1", "jax==0.10.2", "keras==3.15.1")),
}


def python_of(name: str) -> Path | None:
    """Return the interpreter of an environment, or None if it was not made as now.

    Raises:
        ValueError: if there is no environment of this name.
    """
    if name == OWN:
        return Path(sys.executable)
    if name not in ENVIRONMENTS:
        known = ", ".join([OWN, *ENVIRONMENTS])
        raise ValueError(f"environment must be one of {known}; got {name!r}")
    return _python(FOLDER / name) if is_current(name) else None


def available_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def set_up(name: str) -> None:
    """Make an environment anew.

    Raises:
        subprocess.CalledProcessError: if a package cannot be installed.
    """
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    uv = shutil.which("uv")
    if uv:
        _call([uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
        install = [uv, "pip", "install", "--quiet", "--python", str(_python(folder))]
    else:
        _call([sys.executable, "-m", "venv", str(folder)])
        install = [str(_python(folder)), "-m", "pip", "install", "--quiet"]
    _call([*install, *environment.requirements])
    if environment.alone:
        _call([*install, "--no-deps", *environment.alone])
    (folder / _COMPLETE).write_text("\n".join(_requirements(environment)) + "\n")


def is_current(name: str) -> bool:
    """Return whether an environment was made with the present requirements."""
    complete = FOLDER / name / _COMPLETE
    wanted = _requirements(ENVIRONMENTS[name])
    return complete.exists() and complete.read_text().split() == wanted


_COMPLETE = "requirements.txt"


def _requirements(environment: Environment) -> list[str]:
    return [*environment.requirements, *environment.alone]


def _python(folder: Path) -> Path:
    windows = os.name == "nt"
    return folder / ("Scripts/python.exe" if windows else "bin/python")


def _call(command: list[str]) -> None:
    # uv does not read pip's variable.
    links = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    variables = {**{k: v for k, v in links.items() if v}, **os.environ}
    subprocess.run(command, check=True, env=variables)
