"""Latency by size of the catalogue: two stages against ranking all movies.

`prepare` trains small models, grows the catalogue (growth.py) and exports; `measure`
calls the exported models alternately, in a new process for each number of threads.
Weights do not matter for the latency: the training is short.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys_examples.errors import InputError
from recsys_examples.two_stage.latency import BATCH, run_apart
from recsys_examples.two_stage.settings import Settings

if TYPE_CHECKING:
    from recsys_examples.movielens.pipeline import Windows

TWO_STAGES, SEARCHED = "two stages", "two stages, faiss"
FULL, RANKER_OF_ALL = "full catalogue", "ranker of all"
_FOLDERS = {
    TWO_STAGES: "two_stages",
    FULL: "full_catalogue",
    RANKER_OF_ALL: "ranker_of_all",
}
_VECTORS = "vectors.faiss"
_REQUEST = "request.json"
# Users per call are limited so that each needs at most about 2 GiB.
_PAIRS_PER_CALL = {FULL: 100_000_000, TWO_STAGES: 200_000_000, RANKER_OF_ALL: 4_000_000}
_FEWEST_CALLS, _MOST_CALLS = 3, 50
_SLOW = 5.0  # seconds; a slower call is measured once


class Trained:
    """Both models, trained for a short time.

    Args:
        windows: the data.
        settings: settings of the pipeline.
        seed: seed of the weights.
    """

    def __init__(self, windows: Windows, settings: Settings, seed: int = 0) -> None:
        from recsys_examples.movielens.model import Settings as FullSettings
        from recsys_examples.movielens.training import fit_ranker as fit_full
        from recsys_examples.two_stage.first_stage import FirstStage
        from recsys_examples.two_stage.pipeline import examples_of
        from recsys_examples.two_stage.ranker import fit_ranker
        from recsys_examples.two_stage.retrieval import fit_retrieval

        self.settings, self.seed = settings, seed
        catalogue, past = windows.catalogue, windows.train
        towers = fit_retrieval(past, catalogue, settings, seed=seed, epochs=2)
        self.stage = FirstStage(towers, past, catalogue, settings)
        examples = examples_of(self.stage, windows.before_test, settings)
        self.ranker, _ = fit_ranker(examples, settings, seed=seed, epochs=1)
        full = fit_full(past, catalogue, FullSettings(), seed=seed, epochs=1, verbose=0)
        self.full = full.ranker
        self.users = windows.before_test.user_ids[windows.test_task.users]


def prepare(trained: Trained, size: int, folder: Path) -> None:
    """Grow the catalogue to a size and export the models into a folder.

    Raises:
        InputError: if the size is below the number of movies of the data.
    """
    from recsys_examples.two_stage import full_catalogue, search
    from recsys_examples.two_stage.fusion import Fusion
    from recsys_examples.two_stage.growth import GrownStage, draw_parents
    from recsys_examples.two_stage.serving import Recommender, export_stages

    stage, settings = trained.stage, trained.settings
    if size < len(stage.catalogue):
        raise InputError(
            f"--catalogue must be at least {len(stage.catalogue)}, the number of "
            f"movies of the data; got {size}"
        )
    rng = np.random.default_rng(trained.seed)
    popularity = np.bincount(stage.past.movies, minlength=len(stage.catalogue))
    parents = draw_parents(popularity, size, settings.fewest_ratings, rng)
    grown = GrownStage(stage, parents, settings, rng)
    fusion = Fusion(like=1.0, diversity=0.5)
    for name, candidates in ((TWO_STAGES, settings.candidates), (RANKER_OF_ALL, size)):
        grown.take(candidates)
        recommender = Recommender(grown, trained.ranker, fusion)
        export_stages(recommender, folder / _FOLDERS[name], candidates)
    model = full_catalogue.FullCatalogue(
        trained.full, stage.past, grown.catalogue, parents, rng
    )
    full_catalogue.export_full_catalogue(model, folder / _FOLDERS[FULL])
    request: dict[str, Any] = {"size": size, "candidates": settings.candidates}
    if search.is_installed():
        search.write_index(grown.retrieval.candidates, folder / _VECTORS)
    users = trained.users[:BATCH]
    at = np.searchsorted(stage.past.user_ids, users)
    starts = stage.past.starts
    request["users"] = users.tolist()
    request["seen"] = [
        stage.past.movies[starts[u] : starts[u + 1]].tolist() for u in at
    ]
    (folder / _REQUEST).write_text(json.dumps(request))


def measure(folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Measure the models that `prepare` has written.

    Args:
        folder: the folder.
        threads: number of threads of TensorFlow and of faiss.
        seconds: time per model and number of users; at least three calls are made,
            or one if it takes more than 5 seconds.

    Returns:
        For each model `one_ms` and `batch_ms`, medians for 1 and 64 users,
        `users_per_call` if batches are divided, and `recall` of the approximate
        search; and `memory_gib`, the peak of the process.
    """
    request = {"folder": str(folder.absolute()), "threads": threads, "seconds": seconds}
    return run_apart("recsys_examples.two_stage.scale", request)


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(request["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(request["threads"])
    folder = Path(request["folder"])
    given = json.loads((folder / _REQUEST).read_text())
    users = np.resize(np.array(given["users"], np.int64), BATCH)
    models: dict[str, Callable[[np.ndarray], Any]] = {}
    found: dict[str, Any] = {}
    for name, part in _FOLDERS.items():
        signatures = tf.saved_model.load(str(folder / part)).signatures
        limit = max(_PAIRS_PER_CALL[name] // given["size"], 1)
        models[name] = _in_parts(signatures["recommend"], limit)
        found[name] = {"users_per_call": min(limit, BATCH)}
        if name == TWO_STAGES and (folder / _VECTORS).exists():
            searched = _Searched(folder, signatures, given, request["threads"])
            models[SEARCHED] = searched
            found[SEARCHED] = {"recall": searched.recall(users)}
    ones = _seconds(models, [users[i : i + 1] for i in range(BATCH)], request)
    batches = _seconds(models, [users], request)
    for name in models:
        found[name]["one_ms"] = 1e3 * float(np.median(ones[name]))
        found[name]["batch_ms"] = 1e3 * float(np.median(batches[name]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"models": found, "memory_gib": peak / 2**20}


def _in_parts(signature: Any, limit: int) -> Callable[[np.ndarray], Any]:
    """Return a function of user ids that calls a signature with at most `limit`."""
    import tensorflow as tf

    def call(users: np.ndarray) -> Any:
        parts = [users[at : at + limit] for at in range(0, len(users), limit)]
        return [signature(user_id=tf.constant(part)) for part in parts]

    return call


class _Searched:
    """Two stages with faiss' index between them."""

    def __init__(
        self, folder: Path, signatures: Any, given: dict[str, Any], threads: int
    ) -> None:
        from recsys_examples.two_stage.search import read_index

        self._signatures, self._candidates = signatures, given["candidates"]
        self._search = read_index(folder / _VECTORS, threads)
        self._seen = {
            user: np.array(movies, np.int32)
            for user, movies in zip(given["users"], given["seen"], strict=True)
        }
        self._size = given["size"]

    def __call__(self, users: np.ndarray) -> Any:
        import tensorflow as tf

        best, rows = self._find(users)
        return self._signatures["recommend_among"](
            user_id=tf.constant(users), first=tf.constant(best), rows=tf.constant(rows)
        )

    def _find(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import tensorflow as tf

        from recsys_examples.two_stage.search import remove_seen

        queries = self._signatures["queries"](user_id=tf.constant(users))["queries"]
        seen = [self._seen[int(user)] for user in users]
        wanted = min(self._candidates + max(map(len, seen)), self._size)
        scores, rows = self._search(queries.numpy(), wanted)
        return remove_seen(scores, rows, seen, self._candidates)

    def recall(self, users: np.ndarray) -> float:
        """Return the share of the exact candidates that are found."""
        import tensorflow as tf

        exact = self._signatures["retrieve"](user_id=tf.constant(users))["rows"].numpy()
        _, rows = self._find(users)
        return float(
            np.mean([np.isin(*pair).mean() for pair in zip(exact, rows, strict=True)])
        )


def _seconds(
    models: Mapping[str, Callable[[np.ndarray], Any]],
    calls: list[np.ndarray],
    request: dict[str, Any],
) -> dict[str, list[float]]:
    """Call all models alternately; return the seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(calls[0])
    for n in range(_MOST_CALLS):
        for name, model in models.items():
            taken = seconds[name]
            enough = sum(taken) > request["seconds"] and len(taken) >= _FEWEST_CALLS
            if enough or (taken and taken[0] > _SLOW):
                continue
            started = time.perf_counter()
            model(calls[n % len(calls)])
            taken.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
