"""Grown catalogues, the comparison by size, and its report."""

import json

import numpy as np
import pytest
import tensorflow as tf

from recsys_examples.movielens.serving import Recommender
from recsys_examples.two_stage.__main__ import main
from recsys_examples.two_stage.full_catalogue import FullCatalogue
from recsys_examples.two_stage.growth import (
    NOISE,
    draw_parents,
    grow_related,
    grow_vectors,
)
from recsys_examples.two_stage.scale import FULL, RANKER_OF_ALL, TWO_STAGES
from recsys_examples.two_stage.scale_report import crossing, summary, table
from recsys_examples.two_stage.search import remove_seen
from recsys_examples.two_stage.statistics import Related
from recsys_examples.two_stage.towers import MASKED_SCORE
from tests.recsys_examples.test_movielens_command import write_csv
from tests.support import processes


@pytest.fixture
def command(capfd):
    return processes.in_this_process(main, capfd)


@pytest.fixture(scope="module")
def data_dir(movielens, tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "ml", movielens)


class TestGrowth:
    def test_parents_have_enough_ratings(self):
        popularity = np.array([5, 0, 3, 2])
        rng = np.random.default_rng(0)
        parents = draw_parents(popularity, 50, 3, rng)
        np.testing.assert_array_equal(parents[:4], range(4))
        assert set(parents[4:]) == {0, 2}

    def test_vectors_of_children_have_noise(self):
        rng = np.random.default_rng(0)
        # The last dimension is constant, and so stays.
        vectors = np.float32([[1, 0, 1], [-1, 4, 1]])  # deviations 1, 2, 0
        parents = np.array([0, 1] + [1] * 4000)
        grown = grow_vectors(vectors, parents, rng)
        np.testing.assert_array_equal(grown[:2], vectors)
        noise = grown[2:] - vectors[1]
        np.testing.assert_allclose(noise.std(0), NOISE * np.array([1, 2, 0]), rtol=0.05)

    def test_related_movies_are_descendants(self):
        related = Related(
            np.array([[1, 2], [0, 0], [1, 1]], np.int32),
            np.float32([[2, 1], [3, 0], [4, 0]]),
        )
        parents = np.array([0, 1, 2] + [1, 0] * 500)
        grown = grow_related(related, parents, np.random.default_rng(0))
        np.testing.assert_array_equal(parents[grown.rows], related.rows[parents])
        np.testing.assert_array_equal(grown.weights, related.weights[parents])
        # All 501 movies of which movie 1 is the parent are drawn about equally often.
        first = grown.rows[parents == 0, 0]
        assert len(set(first)) > 0.5 * 501


def test_the_full_catalogue_is_that_of_the_movielens_example(trained, windows):
    """On the movies of the data, the lists and scores are the same."""
    ranker, past, catalogue = trained.fit.ranker, windows.train, windows.catalogue
    users = tf.constant(past.user_ids[:20])
    expected = Recommender(ranker, past, catalogue)(users, tf.constant(10))
    rows = np.arange(len(catalogue))
    model = FullCatalogue(ranker, past, catalogue, rows, np.random.default_rng(0))
    found = model(users)
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4)
    np.testing.assert_array_equal(found["movie_id"], expected["movie_id"])
    np.testing.assert_allclose(found["rating"], expected["rating"], rtol=1e-4)


def test_movies_seen_are_removed_from_those_found():
    scores = np.float32([[9, 8, 7, 6], [9, 8, 7, 6]])
    rows = np.array([[3, 1, 2, 0], [5, 4, -1, -1]])
    best, kept = remove_seen(scores, rows, [np.array([1]), np.array([5])], 2)
    np.testing.assert_array_equal(best, [[9, 7], [8, MASKED_SCORE]])
    np.testing.assert_array_equal(kept[0], [3, 2])
    assert kept[1, 0] == 4


class TestReport:
    def test_crossing(self):
        # From 4 to 1 over two decades: 2 after one decade.
        assert crossing([10, 1000], [4.0, 1.0], 2.0) == pytest.approx(100)
        assert crossing([10, 1000], [1.0, 0.5], 2.0) == 10
        assert crossing([10, 1000], [4.0, 3.0], 2.0) == np.inf
        # A ratio that rises again does not count.
        assert crossing([1, 10, 100], [1.0, 3.0, 1.0], 2.0) > 10

    def test_table_and_summary(self):
        def figures(two, full):
            times = {TWO_STAGES: two, FULL: full, RANKER_OF_ALL: 1000.0}
            models = {m: {"one_ms": t, "batch_ms": t} for m, t in times.items()}
            return {1: {"models": models, "memory_gib": 2.5}}

        found = {100: figures(8.0, 4.0), 10_000: figures(10.0, 80.0)}
        rows = table(found).splitlines()
        assert rows[2] == "| 100 | 1 | 1 | 8.0 | absent | 4.0 | 1,000.0 | 2.00 | - |"
        assert rows[5].endswith("| 0.12 | - |")
        lines = summary(found)
        # log-log from 2 to 1/8: 1 after a quarter of the two decades.
        assert lines[0].startswith("1 thread(s), 1 user: faster from 320 movies")
        assert "2.5 GiB" in lines[2]
        assert "faiss is not installed" in lines[3]


class TestCommand:
    def arguments(self, data_dir, out, *sizes):
        return [
            *("--quick", "--candidates", "20", "--data-dir", data_dir, "--out", out),
            *("latency", "--threads", "1", "--seconds", "0", "--catalogue", *sizes),
        ]

    @pytest.mark.long
    @pytest.mark.usefixtures("eager_training")
    def test_files(self, data_dir, tmp_path, command):
        status, output, err = command(*self.arguments(data_dir, tmp_path, 60, 90))
        assert (status, err) == (0, "")
        (run,) = tmp_path.iterdir()
        assert {f.name for f in run.iterdir()} == {
            *("catalogue.png", "latency.json", "latency.md")
        }
        found = json.loads((run / "latency.json").read_text())["found"]
        assert list(found) == ["60", "90"]
        for size in found.values():
            assert {TWO_STAGES, FULL, RANKER_OF_ALL} <= set(size["1"]["models"])
            for times in size["1"]["models"].values():
                assert times["one_ms"] > 0
                assert times["batch_ms"] > 0
        assert "| 90 | 1 | 64 |" in (run / "latency.md").read_text()
        assert "| 90 | 1 | 64 |" in output

    @pytest.mark.usefixtures("eager_training")
    def test_fewer_movies_than_the_data(self, data_dir, tmp_path, command):
        status, _, err = command(*self.arguments(data_dir, tmp_path / "out", 59))
        assert status == 2
        assert err == (
            "error: --catalogue must be at least 60, the number of movies of the "
            "data; got 59\n"
        )
        assert not (tmp_path / "out").exists()
