"""How long SavedModels take to make lists, in a fresh process of so many threads.

TensorFlow takes its number of threads once, so each number has a process of its own.
There the models are asked in turn, so that whatever else the machine does meets them
alike. The process knows TensorFlow alone, as a server would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys_examples.errors import InputError

BATCH = 64
_WARM_UP = 10


def measure_latency(
    folders: Mapping[str, Path], users: Sequence[int], threads: int, calls: int
) -> dict[str, dict[str, float]]:
    """Measure the `recommend` signature of models.

    Args:
        folders: by name, the folder of a SavedModel.
        users: ids to ask for.
        threads: of TensorFlow, within an operation and between operations.
        calls: how often one user is asked for; a batch is asked for half as often.

    Returns:
        By model `p50_ms` and `p99_ms` of one user, `batch_ms`, the median of a batch
        of `BATCH` users, and `users_per_second` in such batches.

    Raises:
        InputError: if the process fails.
    """
    asked = {
        "folders": {name: str(folder.absolute()) for name, folder in folders.items()},
        "users": list(users),
        "threads": threads,
        "calls": calls,
    }
    done = subprocess.run(
        [sys.executable, "-m", "recsys_examples.two_stage.latency"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(f"the process that measures latency failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(asked: dict[str, Any]) -> dict[str, dict[str, float]]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(asked["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(asked["threads"])
    users = np.resize(np.array(asked["users"], np.int64), max(asked["calls"], BATCH))

    def asker(folder: str) -> Callable[[np.ndarray], Any]:
        signature = tf.saved_model.load(folder).signatures["recommend"]
        # The first example is asked for the length of a list.
        takes_k = "k" in signature.structured_input_signature[1]
        more = {"k": tf.constant(10)} if takes_k else {}
        return lambda ids: signature(user_id=tf.constant(ids), **more)

    models = {name: asker(folder) for name, folder in asked["folders"].items()}
    ones = [users[i : i + 1] for i in range(asked["calls"])]
    single = _seconds(models, ones)
    batch = _seconds(models, [users[:BATCH]] * (asked["calls"] // 2))
    return {
        name: {
            "p50_ms": 1e3 * float(np.percentile(single[name], 50)),
            "p99_ms": 1e3 * float(np.percentile(single[name], 99)),
            "batch_ms": 1e3 * float(np.median(batch[name])),
            "users_per_second": BATCH / float(np.median(batch[name])),
        }
        for name in models
    }


def _seconds(
    models: Mapping[str, Callable[[np.ndarray], Any]], questions: list[np.ndarray]
) -> dict[str, list[float]]:
    """Ask all models every question, in turn; return what each answer took."""
    for ask in models.values():
        for question in questions[:_WARM_UP]:
            ask(question)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for question in questions:
        for name, ask in models.items():
            started = time.perf_counter()
            ask(question)
            taken[name].append(time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
