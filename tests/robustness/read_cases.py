"""Damaged and foreign files, read by the library and by the examples' commands.

A case returns None if its outcome is right, else a description.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from recsys_examples.errors import InputError
from tests.robustness.damage import KINDS, copied, damage, error_fault, without_root

Case = Callable[[], str | None]
USERS = np.arange(1, 9)


def damaged(
    source: Path, scratch: Path, rng: random.Random, read: Callable[[Path], Any]
) -> Iterator[Case]:
    """Yield cases without end: a file of a copy of `source` damaged, then `read`.

    `read` returns None if the outcome is right. An InputError that names the file is.
    """
    # Also for its imports, which a user without rights may not be able to do.
    fault = read(source)
    if fault is not None:
        raise RuntimeError(f"the whole {source.name} fails: {fault}")
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    while True:
        # Each file and kind in turn, in a random order.
        for name in rng.sample(files, len(files)):
            kind = rng.choice(KINDS)
            yield lambda name=name, kind=kind: _read(
                source, scratch, rng, read, name, kind
            )


def _read(
    source: Path,
    scratch: Path,
    rng: random.Random,
    read: Callable[[Path], Any],
    name: Path,
    kind: str,
) -> str | None:
    with copied(source, scratch) as copy:
        done = damage(copy / name, kind, rng)
        rights = without_root() if kind == "unreadable" else nullcontext()
        try:
            with rights:
                fault = read(copy)
        except InputError as error:
            fault = error_fault(error, copy)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:300]
        return fault and f"{done}: {fault}"


# SavedModels.


def write_saved_models(folder: Path) -> dict[str, Path]:
    """Write a SavedModel of a mixture, and one with a vocabulary in a file."""
    import keras
    import tensorflow as tf

    import keras_moe

    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="features")
    mixed = keras_moe.layers.MoE(num_experts=3, expert_units=(4, 1))(inputs)
    model = keras.Model(inputs, {"score": mixed})
    keras_moe.export.export_saved_model(model, folder / "mixture")

    vocabulary = folder / "cities.txt"
    vocabulary.write_text("Rome\nOslo\nBonn\n")
    module = tf.Module()
    module.table = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(
            str(vocabulary), tf.string, 0, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        ),
        -1,
    )
    spec = [tf.TensorSpec([None], tf.string, "city")]
    module.find = tf.function(lambda city: {"row": module.table.lookup(city)}, spec)
    tf.saved_model.save(module, str(folder / "vocabulary"), {"find": module.find})
    keras_moe.export.write_checksums(folder / "vocabulary")
    return {name: folder / name for name in ("mixture", "vocabulary")}


def read_saved_model(name: str, folder: Path) -> np.ndarray:
    """Return outputs of a SavedModel of `write_saved_models`."""
    import tensorflow as tf

    from keras_moe import export

    if name == "mixture":
        rows = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)
        return export.load(folder)({"features": rows})["score"]
    loaded = export.load_saved_model(folder).signatures["find"]
    return loaded(city=tf.constant(["Bonn", "Rome", "x"]))["row"].numpy()


def saved_models(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """`keras_moe.export.load`: ValueError that names the path, or the same outputs."""
    sources = write_saved_models(scratch)

    def reader(name: str) -> Callable[[Path], str | None]:
        expected = read_saved_model(name, sources[name])

        def read(folder: Path) -> str | None:
            try:
                found = read_saved_model(name, folder)
            except ValueError as error:
                return error_fault(error, folder)
            return None if np.array_equal(found, expected) else "other outputs"

        return read

    both = [damaged(sources[n], scratch / "copy", rng, reader(n)) for n in sources]
    while True:
        for cases in both:
            yield next(cases)


def write_recommender(folder: Path) -> None:
    """Write a run's folder: a SavedModel with the signature of the MovieLens example.

    It stands for a trained one: the command does not see the difference.
    """
    import tensorflow as tf

    import keras_moe

    module = tf.Module()
    module.scores = tf.Variable(np.linspace(0, 1, 40, dtype="float32"))

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.int64, "user_id"),
            tf.TensorSpec([], tf.int32, "k"),
        ]
    )
    def recommend(user_id: Any, k: Any) -> dict[str, Any]:
        best, rows = tf.math.top_k(module.scores, k)
        best, rows = best[None], tf.cast(rows[None], tf.int64)
        titles = tf.strings.join(["Movie ", tf.strings.as_string(rows)])
        return {
            "movie_id": rows,
            "title": titles,
            "known_user": user_id < 100,
            **{name: best for name in ("score", "watch", "like", "rating")},
        }

    module.recommend = recommend
    path = folder / "saved_model"
    tf.saved_model.save(module, str(path), {"recommend": recommend})
    keras_moe.export.write_checksums(path)


def called(main: Callable[[list[str]], int], *arguments: Any) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def command_fault(status: int, err: str, *names: Path) -> str | None:
    """Return what is wrong with a command that failed: status 2, one line."""
    if status != 2 or not err.startswith("error: ") or err.count("\n") != 1:
        return f"status {status}, stderr {err[:300]!r}"
    return error_fault(ValueError(err.strip()), *names)


def recommend(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """The command `recommend --model`: status 2 and one line, or the same list."""
    from recsys_examples.movielens.__main__ import main

    source = scratch / "run"
    write_recommender(source)
    arguments = ("recommend", "--user", 3, "--k", 4, "--model")
    expected = called(main, *arguments, source)
    if expected[0]:
        raise RuntimeError(f"the whole run fails: {expected[2]}")

    def read(folder: Path) -> str | None:
        found = called(main, *arguments, folder)
        if found == expected:
            return None
        return command_fault(found[0], found[2], folder)

    return damaged(source, scratch / "copy", rng, read)


# Data folders.


def write_movielens(name: str, folder: Path) -> None:
    """Write a data set of 6 users in one of the formats of MovieLens."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ratings = [
        (user, movie, int(rng.integers(1, 6)), 10**9 + 60 * movie)
        for user in range(1, 7)
        for movie in rng.permutation(20)[:8] + 1
    ]
    movies = range(1, 21)
    if name == "ml-csv":
        lines = ["userId,movieId,rating,timestamp"]
        lines += [f"{u},{m},{r}.0,{t}" for u, m, r, t in ratings]
        titles = ["movieId,title,genres"]
        titles += [f'{m},"Movie, The {m} (1990)",Drama|War' for m in movies]
        names = ("ratings.csv", "movies.csv")
    elif name == "ml-100k":
        lines = ["\t".join(map(str, rating)) for rating in ratings]
        flags = "|".join("0" * 18 + "1")
        titles = [f"{m}|Movie {m} (1990)|01-Jan-1990||http://x|{flags}" for m in movies]
        names = ("u.data", "u.item")
    else:
        lines = ["::".join(map(str, rating)) for rating in ratings]
        titles = [f"{m}::Movie {m} (1990)::Drama" for m in movies]
        names = ("ratings.dat", "movies.dat")
    for file, text in zip(names, (lines, titles), strict=True):
        (folder / file).write_text("\n".join(text) + "\n")


def data_readers(scratch: Path) -> dict[Path, Callable[[Path], Any]]:
    """Write a folder of each format; return the function that reads it."""
    from recsys_examples.census_income.data import load_census
    from recsys_examples.click_conversion.streamed import LOGS
    from recsys_examples.movielens.data import load_movielens
    from tests.support import census_files, click_logs

    readers: dict[Path, Callable[[Path], Any]] = {}
    for name in ("ml-csv", "ml-100k", "ml-1m"):
        write_movielens(name, scratch / name)
        readers[scratch / name] = load_movielens
    train, test = census_files.make_rows(20), census_files.make_rows(8, seed=1)
    for name, write, zipped in (
        ("census", census_files.write_official, False),
        ("census-gz", census_files.write_official, True),
        ("census-cut", census_files.write_cut, False),
    ):
        readers[write(scratch / name, train, test, zipped)] = load_census
    for name in click_logs.NAMES:
        click_logs.write(name, scratch / name, rows=20)

        def read(folder: Path, log: Any = LOGS[name]) -> None:
            for part in ("train", "validation", "test"):
                for _ in log.read(folder, part, 1 << 10):
                    pass

        readers[scratch / name] = read
    return readers


def data_folders(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """Readers of data: InputError that names the file, or rows that are valid."""

    def reader(read: Callable[[Path], Any]) -> Callable[[Path], None]:
        def read_all(folder: Path) -> None:
            read(folder)

        return read_all

    formats = [
        damaged(source, scratch / "copy", rng, reader(read))
        for source, read in data_readers(scratch).items()
    ]
    while True:
        for cases in formats:
            yield next(cases)


# Results of studies and runs.


def results(scratch: Path, rng: random.Random) -> Iterator[Case]:
    """Results and metrics: InputError that names the file, or the same values."""
    from recsys_examples.movielens.study import ResultsOnDisk
    from recsys_examples.records import RecordsFile
    from recsys_examples.runs import write_json
    from recsys_examples.two_stage.latency_command import _users_of

    source = scratch / "results"
    for name in ("records", "study", "run"):
        (source / name).mkdir(parents=True)
    path = Path("records/results.jsonl")
    records = [{"model": name, "losses": [0.125, 1 / 3]} for name in "abcd"]
    RecordsFile(source / path, {"version": 1}, resume=False).add(*records)
    on_disk = ResultsOnDisk(source / "study", {"version": 1}, lambda _: None)
    on_disk.get("MMoE, seed 0", lambda: {"auc": 0.7512})
    write_json(source / "run/metrics.json", {"users": [1, 2, 300], "results": {}})

    def read_records(folder: Path) -> str | None:
        found = RecordsFile(folder / path, {"version": 1}, resume=True).found
        values = [record for _, record in found]
        # A cut file is one whose last record was not finished.
        return None if values == records[: len(values)] else f"read {values}"

    def read_study(folder: Path) -> str | None:
        study = ResultsOnDisk(folder / "study", {"version": 1}, lambda _: None)
        found = study.get("MMoE, seed 0", lambda: {"auc": 0.7512})
        return None if found["auc"] == 0.7512 else f"read {found}"

    def read_run(folder: Path) -> str | None:
        users = _users_of(folder / "run")
        return None if users == [1, 2, 300] else f"read {users}"

    parts = {"records": read_records, "study": read_study, "run": read_run}
    each = [
        damaged(source / name, scratch / "copy", rng, _of_parent(read))
        for name, read in parts.items()
    ]
    while True:
        for cases in each:
            yield next(cases)


def _of_parent(read: Callable[[Path], str | None]) -> Callable[[Path], str | None]:
    return lambda folder: read(folder.parent)
