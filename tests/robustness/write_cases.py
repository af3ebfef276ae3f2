"""Writes that fail: a full disk, a read-only one, killed processes, runs at once.

A case returns None if what was there is whole, nothing else is left, and the error is
one line that names the output.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from keras_moe._files import PREFIX
from recsys_examples.errors import InputError
from tests.robustness.damage import contents, error_fault, room
from tests.robustness.read_cases import Case

ROOT = Path(__file__).parents[2]
Write = Callable[[Path], None]


def writers() -> dict[str, tuple[Write, Write]]:
    """Return by name what makes the old output, and the write that is disturbed.

    Both get an empty folder and write to it or below it.
    """
    import keras
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from keras_moe import export
    from recsys_examples.records import RecordsFile
    from recsys_examples.runs import replaced, run_folder, write_json

    inputs = keras.Input((4,), name="features")
    model = keras.Model(inputs, {"score": keras.layers.Dense(3)(inputs)})

    def run(folder: Path) -> None:
        with run_folder(folder / "runs") as (unfinished, _):
            (unfinished / "table.md").write_text("| a |\n" * 50)
            model.save(unfinished / "model.keras")
            plt.figure(figsize=(1, 1)).savefig(unfinished / "picture.png", dpi=20)
            plt.close("all")
            model.export(str(unfinished / "saved_model"), verbose=False)
            write_json(unfinished / "metrics.json", {"auc": [0.5] * 50})

    def json_file(folder: Path) -> None:
        write_json(folder / "metrics.json", {"auc": [0.25] * 50})

    def picture(folder: Path) -> None:
        with replaced(folder / "picture.png") as unfinished:
            plt.figure(figsize=(1, 1)).savefig(unfinished, dpi=20)
            plt.close("all")

    def study(folder: Path) -> None:
        RecordsFile(folder / "results.jsonl", {"a": [1] * 99}, resume=False)

    def record(folder: Path) -> None:
        file = RecordsFile(folder / "results.jsonl", {"a": [1] * 99}, resume=True)
        file.add({"losses": [0.5] * 50})

    def exported(name: str, format: str) -> Write:
        return lambda folder: export.export_model(model, folder / name, format)

    def nothing(folder: Path) -> None:
        (folder / "other").write_text("kept")

    return {
        "a run": (run, run),
        "metrics.json": (json_file, json_file),
        "picture.png": (picture, picture),
        "a study": (nothing, study),
        "a record": (study, record),
        "SavedModel": (nothing, exported("1", "tf_saved_model")),
        "ONNX": (nothing, exported("1.onnx", "onnx")),
        "LiteRT": (nothing, exported("1.tflite", "litert")),
        "OpenVINO": (nothing, exported("1.xml", "openvino")),
    }


def full_disk(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """Each write with room for some bytes a file, from none to more than it needs."""
    yield from _disturbed(scratch, lambda _: room(int(4 ** rng.uniform(0, 8)) - 1), rng)


def small_disk(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """Each write on a file system that is small, or read-only after the old output."""
    yield from _disturbed(
        scratch, lambda folder: _changed_mount(folder, rng), rng, _mounted
    )


def can_mount(scratch: Path) -> bool:
    """Return whether this process may mount file systems."""
    folder = scratch / "mount"
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    with suppress(OSError):
        if subprocess.run(made, check=False, capture_output=True).returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
            return True
    return False


@contextmanager
def _changed_mount(folder: Path, rng: random.Random) -> Iterator[None]:
    """Make the file system of a folder read-only, or leave it little room."""
    if rng.random() < 0.3:
        option = "remount,ro"
    else:
        used = sum(path.stat().st_size + 4096 for path in folder.rglob("*"))
        option = f"remount,size={used // 1024 + 8 + int(4 ** rng.uniform(0, 4))}k"
    subprocess.run(["mount", "-o", option, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw,size=64m", str(folder)], check=True)


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    made = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    subprocess.run(made, check=True)
    try:
        yield
    finally:  # a library may keep a file open
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _disturbed(
    scratch: Path,
    disturbance: Callable[[Path], Any],
    rng: random.Random,
    disk: Callable[[Path], Any] = nullcontext,
) -> Iterator[Case]:
    known = writers()
    while True:
        # The exports of other formats take seconds: a fifth of the cases.
        name = rng.choice(list(known)[:6] if rng.random() < 0.8 else list(known)[6:])
        yield lambda name=name: _on_disk(
            scratch / "disk",
            disk,
            lambda folder, name=name: _write(folder, disturbance, name, *known[name]),
        )


def _on_disk(
    folder: Path, disk: Callable[[Path], Any], case: Callable[[Path], str | None]
) -> str | None:
    folder.mkdir()
    try:
        with disk(folder):
            return case(folder)
    finally:
        shutil.rmtree(folder)


def _write(
    folder: Path,
    disturbance: Callable[[Path], Any],
    name: str,
    before: Write,
    write: Write,
) -> str | None:
    before(folder)
    old = contents(folder)
    try:
        with disturbance(folder):
            write(folder)
    except (InputError, OSError) as error:
        fault = error_fault(error, folder) or _changed(folder, old)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:300]
    else:  # there was room
        fault = _left(folder)
    return fault and f"{name}: {fault}"


def _changed(folder: Path, old: dict[str, bytes]) -> str | None:
    found = contents(folder)
    if found != old:
        return f"not as before: {sorted(found)}, was {sorted(old)}"
    return _left(folder)


def _left(folder: Path) -> str | None:
    left = [str(p) for p in folder.rglob("*") if p.name.startswith((PREFIX, ".unf"))]
    return f"left {left}" if left else None


# Processes.

_RUNS = """
import sys
from pathlib import Path
from recsys_examples.runs import run_folder, write_json

parent, wait = Path(sys.argv[1]), sys.argv[2] == "wait"
while True:
    with run_folder(parent) as (folder, final):
        (folder / "name").write_text(final.name)
        (folder / "deep").mkdir()
        (folder / "deep" / "bytes").write_bytes(bytes(100_000))
        write_json(folder / "metrics.json", {"name": final.name})
        print("ready", flush=True)
        if wait:
            sys.stdin.read()
    if wait:
        break
"""


def _start(parent: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _RUNS, str(parent), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )


def runs_at_once(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """Eight runs that begin before the first ends: eight whole folders."""
    while True:
        yield lambda: _at_once(scratch / "runs")


def _at_once(parent: Path) -> str | None:
    runs = [_start(parent, "wait") for _ in range(8)]
    for run in runs:
        assert run.stdout
        run.stdout.readline()
    for run in runs:
        run.communicate()
    statuses = [run.returncode for run in runs]
    names = os.listdir(parent)
    fault = _wrong_runs(parent)
    shutil.rmtree(parent)
    if statuses != [0] * 8 or len(names) != 8:
        return f"{len(names)} folders of 8 runs, statuses {statuses}"
    return fault


def killed_runs(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """SIGKILL at a random moment of a loop of runs, beside a living run.

    The next run removes what the killed process left, and not the living one's folder.
    """
    while True:
        yield lambda: _killed(scratch / "runs", rng.uniform(0, 0.05))


def _killed(parent: Path, seconds: float) -> str | None:
    from recsys_examples.runs import run_folder

    living, killed = _start(parent, "wait"), _start(parent, "go on")
    for run in (living, killed):
        assert run.stdout
        run.stdout.readline()
    time.sleep(seconds)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with run_folder(parent) as (folder, final):
        (folder / "name").write_text(final.name)
        hidden = len(list(parent.glob(f"{PREFIX}*")))
    living.communicate()
    for run in (living, killed):
        assert run.stdout
        run.stdout.close()
    if killed.stdin:
        with suppress(OSError):
            killed.stdin.close()
    fault = _wrong_runs(parent) or _left(parent)
    shutil.rmtree(parent)
    if hidden != 2 or living.returncode:
        return f"{hidden} hidden folders, the living run ended with {living.returncode}"
    return fault


def _wrong_runs(parent: Path) -> str | None:
    """Return which folder is not a whole run that knows its name."""
    for folder in parent.iterdir():
        if (folder / "name").read_text() != folder.name:
            return f"{folder.name} holds another run"
        rest = folder / "deep" / "bytes"
        if rest.exists() and rest.stat().st_size != 100_000:
            return f"{folder.name} is not whole"
    return None
