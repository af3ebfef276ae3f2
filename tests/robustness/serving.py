"""Many callers of an exported model: equal answers, named errors, steady memory.

    python -m tests.robustness.serving --callers 64 --minutes 10 --json serving.json

Two SavedModels are served by `keras_moe.export.load`, each for half of the time: a
ranker with embeddings and a sparse MMoE, and a sparse MoE with dispatch "split". Every
caller is a thread that sends requests one after another: mostly valid ones, whose
answers must equal, to the last bit, those of one caller alone; and one in five invalid,
which must be refused by an error that names the feature. The memory of the process may
grow by 5% after a warm-up. The sparse MoE is then served by TensorFlow's C API, without
Python, with as many callers.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_moe import export
from keras_moe.layers import MMoE, MoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.robustness import results
from tests.robustness.results import Tried

GROWTH = 0.05
INVALID = 0.2  # the share of invalid requests
WARM_UP = 0.3  # the share of the time after which memory must be steady
C_SERVER = Path(__file__).parents[1] / "support" / "c_api_server.py"
TASKS = ("click", "stars")
USERS, ITEMS, RECENT = 1_000, 5_000, 20
_STEP, _FIRST = 1.02, 1e-5  # of the bins of latencies, in seconds


def ranker() -> keras.Model:
    """Return a ranker of items for users, with a history of ids."""
    layers = keras.layers
    inputs = {
        "user": keras.Input((), dtype="int64", name="user"),
        "item": keras.Input((), dtype="int64", name="item"),
        "recent": keras.Input((RECENT,), dtype="int64", name="recent"),
        "context": keras.Input((8,), name="context"),
    }
    items = layers.Embedding(ITEMS, 32, name="items")
    parts = [
        layers.Embedding(USERS, 32, name="users")(inputs["user"]),
        items(inputs["item"]),
        layers.GlobalAveragePooling1D()(items(inputs["recent"])),
        inputs["context"],
    ]
    shared = MMoE(8, (64, 32), TASKS, top_k=2)(layers.Concatenate()(parts))
    outputs = {
        "click": Tower((16,), activation="sigmoid")(shared["click"]),
        "stars": Tower((16,))(shared["stars"]),
    }
    return MultiTaskModel(inputs, outputs)


def sparse() -> keras.Model:
    """Return a sparse mixture of experts of rows of 8 features."""
    inputs = keras.Input((8,), name="features")
    mixed = MoE(16, (64, 32), top_k=2, dispatch="split")(inputs)
    return keras.Model(inputs, {"score": Tower(())(mixed)})


MODELS = {
    "ranker with embeddings and MMoE(top_k=2)": ranker,
    'MoE(top_k=2, dispatch="split")': sparse,
}


@dataclass(frozen=True)
class Case:
    """A request: with the answers, or with the feature that an error must name."""

    request: dict[str, Any]
    answers: dict[str, np.ndarray] | None = None
    kind: str = "valid"
    feature: str = ""


def valid_requests(served: Any, number: int) -> list[Case]:
    """Return requests of 0 to 32 rows, with the answers to one caller alone."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, *rng.integers(1, 33, number - 2)]
    requests = [_request(served, rng, int(size)) for size in sizes]
    return [Case(request, served(request)) for request in requests]


def _request(served: Any, rng: np.random.Generator, rows: int) -> dict[str, Any]:
    request = {}
    for name, spec in served.features.items():
        shape = (rows, *spec.shape[1:])
        if spec.dtype.is_floating:
            request[name] = rng.normal(size=shape).astype("float32")
        else:
            request[name] = rng.integers(0, _rows(name), shape)
    return request


def _rows(feature: str) -> int:
    return USERS if feature == "user" else ITEMS


def invalid_requests(served: Any) -> list[Case]:
    """Return a request for each feature and each way to be wrong."""
    right = _request(served, np.random.default_rng(1), 4)
    cases = []

    def add(kind: str, feature: str, request: Mapping[str, Any]) -> None:
        cases.append(Case(dict(request), kind=kind, feature=feature))

    add("unknown feature", "colour", {**right, "colour": [1] * 4})
    for name, values in right.items():
        others = {key: value for key, value in right.items() if key != name}
        add("missing feature", name, others)
        wrong: dict[str, Any] = {
            "shape": values[..., None],
            "dtype": values.astype("float64"),
            "strings": np.full(values.shape, "a").tolist(),
            "None": None,
            "ragged lists": [[1], [1, 2], [1], [1]],
        }
        if len(right) > 1:
            wrong["batch size"] = values[:2]
        if values.dtype.kind == "f":
            for number in (np.nan, np.inf, -np.inf):
                wrong[str(number)] = values.copy()
                wrong[str(number)].flat[-1] = number
        else:
            for number in (_rows(name), -1, 2**62):
                wrong[f"id {number}"] = values.copy()
                wrong[f"id {number}"].flat[-1] = number
        for kind, value in wrong.items():
            kind = "id out of range" if kind.startswith("id ") else kind
            kind = "NaN or infinity" if kind in ("nan", "inf", "-inf") else kind
            add(kind, name, {**others, name: value})
    return cases


@dataclass
class Outcome:
    """What one caller saw.

    Attributes:
        tried: the number of requests, by kind.
        survived: the number of them with the right outcome.
        latencies: the number of valid requests, by bin.
        failures: the first messages of wrong outcomes.
    """

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    latencies: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.tried += other.tried
        self.survived += other.survived
        self.latencies += other.latencies
        self.failures = (self.failures + other.failures)[:10]

    def percentile(self, share: float) -> float:
        """Return a percentile of the latencies in seconds, within 2%."""
        wanted = share * self.latencies.total()
        for step in sorted(self.latencies):
            wanted -= self.latencies[step]
            if wanted <= 0:
                return _FIRST * _STEP**step
        return math.nan


def _send(served: Any, case: Case, outcome: Outcome) -> None:
    """Send a request and judge the outcome."""
    outcome.tried[case.kind] += 1
    begun = time.perf_counter()
    found, problem = None, None
    try:
        found = served(case.request)
    except ValueError as error:
        problem = str(error)
    except Exception as error:
        outcome.failures.append(f"{case.kind}: {error!r}")
        return
    if case.answers is None:
        right = problem is not None and case.feature in problem
    else:
        spent = max(time.perf_counter() - begun, _FIRST)
        outcome.latencies[round(math.log(spent / _FIRST, _STEP))] += 1
        right = found is not None and all(
            np.array_equal(found[task], expected)
            for task, expected in case.answers.items()
        )
    outcome.survived[case.kind] += right
    if not right and len(outcome.failures) < 10:
        outcome.failures.append(f"{case.kind} {case.feature}: {problem or found!r}")


@dataclass(frozen=True)
class Soak:
    """The outcomes of all callers together, and the memory after the warm-up."""

    outcome: Outcome
    memory: list[int]

    @property
    def growth(self) -> float:
        """The growth of the memory, from the first fifth to the last one."""
        part = max(1, len(self.memory) // 5)
        first = statistics.median(self.memory[:part])
        return statistics.median(self.memory[-part:]) / first - 1


def soak(served: Any, callers: int, seconds: float) -> Soak:
    """Let callers send requests at the same time, for a while."""
    valid, invalid = valid_requests(served, 200), invalid_requests(served)
    stop = threading.Event()
    outcomes = [Outcome() for _ in range(callers)]

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            cases = invalid if rng.random() < INVALID else valid
            _send(served, cases[rng.integers(len(cases))], outcomes[seed])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    begun, memory = time.monotonic(), []
    for thread in threads:
        thread.start()
    while (passed := time.monotonic() - begun) < seconds:
        time.sleep(0.25)
        if passed > WARM_UP * seconds:
            memory.append(resident_bytes())
    stop.set()
    for thread in threads:
        thread.join()
    total = Outcome()
    for outcome in outcomes:
        total.add(outcome)
    return Soak(total, memory)


def resident_bytes() -> int:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def lines(name: str, callers: int, seconds: float, found: Soak) -> list[Tried]:
    """Return the lines of the page for one model."""
    outcome = found.outcome
    half, most = outcome.percentile(0.5), outcome.percentile(0.99)
    timed = f"p50 {1e3 * half:.1f} ms, p99 {1e3 * most:.1f} ms"
    failures = f"; {'; '.join(outcome.failures[:3])}" if outcome.failures else ""
    who = f"{name}, {callers} callers, {seconds:.0f} s"
    tried = [
        Tried(
            *(f"valid requests of 0 to 32 rows: {who}", outcome.tried["valid"]),
            *(outcome.survived["valid"], "the bits of one caller's answer alone"),
            timed + failures,
        )
    ]
    for kind in sorted(outcome.tried):
        if kind != "valid":
            numbers = outcome.tried[kind], outcome.survived[kind]
            rule = "an error that names the feature"
            tried.append(Tried(f"invalid requests, {kind}: {name}", *numbers, rule))
    note = (
        f"{found.growth:+.1%} from {found.memory[0] / 2**20:,.0f} MiB after the warm-up"
    )
    survived = int(found.growth <= GROWTH)
    rule = f"memory grows by at most {GROWTH:.0%} after the warm-up"
    return [*tried, Tried(f"memory: {who}", 1, survived, rule, note)]


def c_api(folder: Path, callers: int, seconds: float) -> Tried:
    """Serve the sparse mixture of `folder` by TensorFlow's C API."""
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    given, output = signature.inputs["features"].name, signature.outputs["score"].name
    rows = np.random.default_rng(0).normal(size=(2 * callers + 2, 8)).astype("float32")
    rows.tofile(folder.parent / "rows")
    done = subprocess.run(
        [
            *(sys.executable, "-I", C_SERVER, Path(tf.__file__).parent, folder, given),
            *("8", output, folder.parent / "rows", folder.parent / "found"),
            *(str(callers), str(seconds)),
        ],
        capture_output=True,
        text=True,
        timeout=seconds + 300,
        check=False,
    )
    note = (done.stdout or done.stderr).strip().splitlines()[-1]
    counted = note.split()
    cases = int(counted[2]) if done.returncode == 0 else 1
    what = f"requests to TensorFlow's C API: {callers} callers, {seconds:.0f} s"
    rule = f"the bits of one caller's answer alone; memory within {GROWTH:.0%}"
    return Tried(what, cases, cases if done.returncode == 0 else 0, rule, note)


def main() -> None:
    """Run the command of the first lines of this file."""
    parser = argparse.ArgumentParser(description="Many callers of exported models.")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, default=Path("serving.json"))
    parser.add_argument("--note", default="", help="added to the latencies")
    options = parser.parse_args()
    tried: list[Tried] = []
    # A sixth of the time is for the C API.
    each, last = 60 * options.minutes * 5 / 12, 60 * options.minutes / 6
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, build) in enumerate(MODELS.items()):
            path = Path(folder, str(number), "1")
            export.export_saved_model(build(), path)
            found = soak(export.load(path), options.callers, each)
            tried += lines(name, options.callers, each, found)
        tried.append(c_api(path, options.callers, last))
    if options.note:
        tried = [
            Tried(t.what, t.cases, t.survived, t.outcome, f"{t.note} ({options.note})")
            if t.note.startswith("p50")
            else t
            for t in tried
        ]
    for line in tried:
        print(line.what, f"{line.survived:,} of {line.cases:,}", line.note, sep=" | ")
    command = (
        f"python -m tests.robustness.serving --callers {options.callers} "
        f"--minutes {options.minutes:g}"
    )
    results.write(options.json, "serving", command, tried)
    if any(line.survived < line.cases for line in tried):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
