"""Files of models that nobody trusts: safe mode holds in every nested object.

    python -m tests.robustness.untrusted --json FILE

Each crafted `.keras` file is loaded as a user would, in Keras' default safe mode: it
raises an error or it loads, and no code of it runs, no file outside is written or read.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import stat
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.progress import track

import keras_moe
from keras_moe import experts, layers, metrics, multitask, optimizers, routers
from tests.robustness import results
from tests.robustness.payloads import CHANGES, PAYLOADS, SECRET, Target
from tests.robustness.watch import Watch, temporary_files_in, tree

OUTCOME = "an error, or a model; no code runs, no file outside is written or read"


def models() -> dict[str, keras.Model]:
    """Compiled models whose configs hold every kind of nested object of ours."""
    inputs = keras.Input((6,))
    sparse = layers.MoE(
        router=routers.TopKRouter(2, 1),
        experts=experts.LayerExperts(
            [keras.layers.Dense(4), keras.Sequential([keras.layers.Dense(4)])]
        ),
    )(inputs)
    gated = layers.MMoE(2, None, ["a", "b"], experts=experts.MLPExperts(2, 3))(sparse)
    towers = {
        name: layers.Tower((3,), "sigmoid", kernel_regularizer="l2", name=name)(
            gated[name]
        )
        for name in ("a", "b")
    }
    tasks = [
        multitask.Task("a", metrics=[metrics.GAUC("user", max_rows=8)], loss="mse"),
        multitask.Task("b", multitask.heads.Binary(), metrics=["auc"]),
    ]
    weighted = multitask.MultiTaskModel(
        inputs, towers, loss_weighting=multitask.weighting.DWA(3), tasks=tasks
    )
    weighted.compile(
        optimizers.LazyAdam(keras.optimizers.schedules.CosineDecay(0.1, 9))
    )
    plain = keras.Sequential(
        [
            keras.Input((6,)),
            layers.PLE(1, 1, 1, None, 1, experts=[experts.GLUExperts(2, 3, 4)]),
        ]
    )
    soft = keras.Input((2, 6))
    mixed = layers.SoftMoE(
        experts=experts.MLPExperts(
            2, 3, kernel_initializer=keras_moe.initializers.PerExpert("he_normal")
        ),
    )(soft)
    model = keras.Model(soft, mixed)
    model.compile(
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                optimizers.FusedAdam(), {".*/phi": optimizers.FusedAdagrad()}
            )
        )
        if hasattr(keras.optimizers, "OptimizerMap")  # From Keras 3.15 on.
        else optimizers.FusedAdam(),
        loss=multitask.heads.SquaredError(),
        metrics=[metrics.BySegment(keras.metrics.AUC(), 2), metrics.PCOC()],
    )
    return {"multi-task": weighted, "extraction": plain, "soft": model}


def slots(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a config that a loader may make an object of."""
    if isinstance(config, dict):
        if "class_name" in config and path:
            yield path
        for key, value in config.items():
            yield from slots(value, (*path, key))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from slots(value, (*path, i))
    elif path and path[-1] in _NAMED and config is not None:
        yield path


_NAMED = ("activation", "hidden_activation", "dispatch", "loss", "head", "defined")


def _at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def _with(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(config)
    _at(changed, path[:-1])[path[-1]] = value
    return changed


class Archive:
    """The members of a `.keras` file."""

    def __init__(self, model: keras.Model) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            model.save(path)
            with zipfile.ZipFile(path) as file:
                self.members = {name: file.read(name) for name in file.namelist()}
        self.config = json.loads(self.members["config.json"])

    def write(self, path: Path, config: Any = None, more: Any = ()) -> None:
        """Write the file with another config, and more members (name, bytes)."""
        members = dict(self.members)
        if config is not None:
            members["config.json"] = json.dumps(config).encode()
        replaced = {getattr(name, "filename", name) for name, _ in more}
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
            warnings.simplefilter("ignore")  # Of names that are there twice.
            for name, content in members.items():
                if name not in replaced:
                    file.writestr(name, content)
            for name, content in more:
                file.writestr(name, content)


Case = tuple[str, Callable[[Path, Target], None]]


def config_cases() -> Iterator[Case]:
    """Every payload and change in every slot of every model."""
    for kind, model in models().items():
        archive = Archive(model)
        for path in slots(archive.config):
            where = f"{kind}: {'.'.join(map(str, path))}"
            for name, payload in PAYLOADS.items():
                yield (
                    f"{where} <- {name}",
                    lambda file, target, a=archive, p=path, make=payload: a.write(
                        file, _with(a.config, p, make(target))
                    ),
                )
            for name, change in CHANGES.items():
                yield (
                    f"{where} with {name}",
                    lambda file, target, a=archive, p=path, make=change: a.write(
                        file, _with(a.config, p, make(_at(a.config, p), target))
                    ),
                )


def archive_cases() -> Iterator[Case]:
    """Members whose paths lead out of the archive, and weights that lie elsewhere."""
    up = "/".join([".."] * 12)
    for kind, model in models().items():
        archive = Archive(model)

        def members(make: Callable[[Target], Any], a: Archive = archive) -> Any:
            return lambda file, target: a.write(file, more=make(target))

        paths: dict[str, Callable[[Target], str]] = {
            "..": lambda t: f"../{t.canary.name}",
            "many ..": lambda t: f"{up}{t.canary}",
            "an absolute path": lambda t: str(t.canary),
            ".. below assets": lambda t: f"assets/../../../{t.canary.name}",
            "backslashes": lambda t: f"..\\..\\{t.canary.name}",
            "an asset of a layer": lambda t: f"assets/layers/moe/{up}{t.canary}",
        }
        for name, path in paths.items():
            yield f"{kind}: {name}", members(lambda t, path=path: [(path(t), b"x")])
        for link in ("model.weights.h5", "config.json", "assets"):
            for goal in ("secret", "folder"):
                yield (
                    f"{kind}: {link} is a link to the {goal}",
                    members(
                        lambda t, link=link, goal=goal: [
                            (_link(link), str(getattr(t, goal)).encode())
                        ]
                    ),
                )
        yield (
            f"{kind}: a file through a linked folder",
            members(
                lambda t: [
                    (_link("assets"), str(t.folder).encode()),
                    (f"assets/{t.canary.name}", b"x"),
                ]
            ),
        )
        for name in ("link", "storage"):
            yield (
                f"{kind}: weights with an external {name}",
                members(
                    lambda t, name=name, a=archive: [
                        (
                            "model.weights.h5",
                            _external(a.members["model.weights.h5"], name, t),
                        )
                    ]
                ),
            )


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def _external(weights: bytes, kind: str, target: Target) -> bytes:
    """Weights of which one dataset lies in another file."""
    import h5py

    outside = target.folder / "outside.h5"
    buffer = io.BytesIO(weights)
    with h5py.File(buffer, "r+") as file:
        found: list[Any] = []
        file.visititems(
            lambda name, item: found.append(name) if hasattr(item, "shape") else None
        )
        name = found[0]
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        if kind == "link":
            with h5py.File(outside, "w") as other:
                other["x"] = np.full(shape, 1234.5, dtype)
            file[name] = h5py.ExternalLink(str(outside), "x")
        else:
            raw = target.folder / "outside.bin"
            raw.write_bytes(np.full(shape, 1234.5, dtype).tobytes())
            file.create_dataset(
                name, shape, dtype, external=[(str(raw), 0, h5py.h5f.UNLIMITED)]
            )
    return buffer.getvalue()


def attempt(case: Case, watch: Watch, safe_mode: bool = True) -> tuple[str, str | None]:
    """Load one crafted file; return "refused" or "loaded", and what is wrong."""
    _name, write = case
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(folder).resolve()
        target = Target(root / "private")
        target.folder.mkdir()
        target.secret.write_text(SECRET)
        inner = root / "a" / "b" / "c"
        inner.mkdir(parents=True)
        scratch = root / "scratch"
        scratch.mkdir()
        file = inner / "model.keras"
        write(file, target)
        before = tree(root, but=scratch)
        outcome, model = "loaded", None
        with (
            temporary_files_in(scratch),
            watch.watching(target.folder, scratch) as events,
        ):
            try:
                model = keras.saving.load_model(file, safe_mode=safe_mode)
            except Exception:
                outcome = "refused"
        wrong = None
        if events:
            wrong = f"did {sorted({*events})}"
        elif (after := tree(root, but=scratch)) != before:
            changed = after.items() ^ before.items()
            wrong = f"wrote {sorted({path for path, _ in changed})}"
        elif keras.src.saving.serialization_lib.in_safe_mode() is False:
            wrong = "switched safe mode off"
        elif model is not None and _holds_secret(model):
            wrong = "read a file outside"
        return outcome, wrong


def _holds_secret(model: keras.Model) -> bool:
    for layer in model._flatten_layers():
        if hasattr(layer, "get_vocabulary") and SECRET in map(
            str, layer.get_vocabulary()
        ):
            return True
    return any((np.asarray(w) == 1234.5).any() for w in model.get_weights())


def cases(count: int | None = None) -> list[Case]:
    """All cases; or about `count`, of each slot and each payload some."""
    found = [*config_cases()]
    archives = [*archive_cases()]
    if count is not None:
        # A step without a common factor with the payloads visits all of them.
        step = max(1, len(found) // max(1, count - len(archives) // 3))
        while np.gcd(step, len(PAYLOADS) + len(CHANGES)) != 1:
            step += 1
        found, archives = found[::step], archives[: min(count, len(archives)) // 3]
    return [*found, *archives]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cases", type=int, metavar="N", help="about N; default: all")
    parser.add_argument("--only", metavar="TEXT", help="cases whose names hold it")
    arguments = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    watch = Watch()
    chosen = [
        c
        for c in cases(arguments.cases)
        if not arguments.only or arguments.only in c[0]
    ]
    refused, wrongs = 0, []
    for case in track(chosen, "files", console=console):
        outcome, wrong = attempt(case, watch)
        refused += outcome == "refused"
        if wrong:
            wrongs.append(f"{case[0]}: {wrong}")
            console.print(wrongs[-1], f"--only '{case[0]}'", markup=False)
    note = f"{refused} refused, {len(chosen) - refused} loaded"
    if wrongs:
        note += f"; wrong, for example: {wrongs[0]}"
    line = results.Tried(
        "crafted `.keras` files", len(chosen), len(chosen) - len(wrongs), OUTCOME, note
    )
    console.print(f"{line.survived} of {line.cases}. {note}")
    if arguments.json:
        command = "python -m tests.robustness.untrusted"
        command += f" --cases {arguments.cases}" if arguments.cases else ""
        results.write(arguments.json, "untrusted", command, [line])
    return int(bool(wrongs))


if __name__ == "__main__":
    sys.exit(main())
