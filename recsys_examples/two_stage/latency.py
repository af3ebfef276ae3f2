"""Latency of the SavedModels' `recommend` signature, by number of threads.

TensorFlow's number of threads is fixed per process: each number is measured in a new
process. The models are called alternately, which exposes them to the same load of the
machine. The process imports only TensorFlow, like a server.
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
    """Measure the latency of the `recommend` signatures of models.

    Args:
        folders: maps names to folders of SavedModels.
        users: user ids.
        threads: number of TensorFlow's intra-op and inter-op threads.
        calls: number of calls with one user; half as many are made with a batch.

    Returns:
        For each model `p50_ms` and `p99_ms` with one user, `batch_ms`, the median with
        `BATCH` users, and `users_per_second` in such batches.

    Raises:
        InputError: if the process fails.
    """
    request = {
        "folders": {name: str(folder.absolute()) for name, folder in folders.items()},
        "users": list(users),
        "threads": threads,
        "calls": calls,
    }
    return run_apart("recsys_examples.two_stage.latency", request)


def run_apart(module: str, request: dict[str, Any]) -> Any:
    """Run a module in a new process; return what it prints, parsed as JSON.

    Args:
        module: a module that reads a request as JSON from stdin.
        request: the request.

    Raises:
        InputError: if the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no error message").splitlines()[-1]
        raise InputError(f"the latency benchmark failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(request: dict[str, Any]) -> dict[str, dict[str, float]]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(request["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(request["threads"])
    users = np.resize(
        np.array(request["users"], np.int64), max(request["calls"], BATCH)
    )

    def load(folder: str) -> Callable[[np.ndarray], Any]:
        try:
            signature = tf.saved_model.load(folder).signatures["recommend"]
        except Exception as error:  # TensorFlow raises many kinds for a damaged file
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            sys.exit(f"{folder} cannot be loaded: {reason}")
        # The signature of the MovieLens example takes the length of the list.
        takes_k = "k" in signature.structured_input_signature[1]
        extra = {"k": tf.constant(10)} if takes_k else {}
        return lambda ids: signature(user_id=tf.constant(ids), **extra)

    models = {name: load(folder) for name, folder in request["folders"].items()}
    ones = [users[i : i + 1] for i in range(request["calls"])]
    single = _seconds(models, ones)
    batch = _seconds(models, [users[:BATCH]] * (request["calls"] // 2))
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
    models: Mapping[str, Callable[[np.ndarray], Any]], batches: list[np.ndarray]
) -> dict[str, list[float]]:
    """Call all models alternately on each batch; return the seconds of each call."""
    for model in models.values():
        for users in batches[:_WARM_UP]:
            model(users)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for users in batches:
        for name, model in models.items():
            started = time.perf_counter()
            model(users)
            seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
